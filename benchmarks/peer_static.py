"""onnxruntime's own quantizer, as its documentation advises for CPUs: QDQ, u8 activations, s8 weights per channel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
from onnxruntime.quantization.quantize import quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

OPERATORS = ["MatMul", "Gemm"]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands out calls {input: array} one by one."""

    def __init__(self, calls: Sequence[dict[str, np.ndarray[Any, Any]]]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> Any:
        return next(self._calls, None)


def preprocess(source: Path, out: Path) -> None:
    """Shape inference and basic optimisation, the documented first step."""
    quant_pre_process(
        source,
        out,
        skip_symbolic_shape=True,  # every shape is static
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        external_data_location=f"{out.name}.data",
    )


def quantize(
    source: Path,
    out: Path,
    calls: Sequence[dict[str, Any]] | None,
    ranges: Path | None = None,
    *,
    method: str = "MinMax",
    float_nodes: Sequence[str] = (),
) -> None:
    """Quantize a preprocessed model. ranges: a file that keeps what calibration found; `calls` None uses it.

    method: of calibration. float_nodes: left alone; named as before preprocessing, which appends to names.
    """
    nodes = onnx.load(source, load_external_data=False).graph.node
    quantize_static(
        source,
        out,
        None if calls is None else Reader(calls),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=OPERATORS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[method],
        nodes_to_exclude=[node.name for node in nodes if node.name.split("/")[0] in set(float_nodes)],
        calibration_cache_path=ranges,
    )
