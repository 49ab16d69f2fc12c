"""OpenVINO (package openvino): found, compiled with the settings that keep the plan's numbers, and its kernels told.

SETTINGS: without them OpenVINO computes what is not integer in bfloat16 on processors that have it, and quantizes the
inputs of linears with 8- or 4-bit weights and float inputs at run time, 32 channels at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from vdq_export.devices import vendor_tool
from vdq_export.errors import CompileError

Array = np.ndarray[Any, Any]  # not graph.Array: what runs bundles does without the exporter's packages
SETTINGS = {"EXECUTION_MODE_HINT": "ACCURACY"}


def version() -> str:
    """Of the installed package. Raises MissingToolError without it."""
    _package()
    return metadata.version("openvino")


def compile_graph(graph: Path, settings: Mapping[str, str] = SETTINGS, *, device: str = "CPU") -> Any:
    """openvino.CompiledModel of an .onnx file.

    Raises MissingToolError without openvino, CompileError with its own words when it refuses the graph.
    """
    package = _package()
    try:
        core = package.Core()
        return core.compile_model(core.read_model(str(graph)), device, dict(settings))
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {version()} refuses {graph}: {_reason(str(error))}") from error


def run(compiled: Any, feeds: Mapping[str, Array], output: str) -> Array:
    """The value `output` for inputs by name; those the graph does not have are left out."""
    names = {name for port in compiled.inputs for name in port.names}
    result = compiled({name: value for name, value in feeds.items() if name in names})
    return np.array(result[output])


def kernels(compiled: Any) -> dict[str, str]:
    """Name of each operator that runs -> its kernel, "brgemm_avx512_I8" …; fused ones by the name of the first."""
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        told = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if told.get("originalLayersNames"):
            found[told["originalLayersNames"].split(",")[0]] = told["primitiveType"]
    return found


def integer_layers(compiled: Any, layers: Iterable[str]) -> set[str]:
    """Those of `layers` that the compiled graph runs in 8-bit integer kernels."""
    integer = [name for name, kernel in kernels(compiled).items() if kernel.lower().endswith("_i8")]
    return {layer for layer in layers if any(name.startswith(f"{layer}/") for name in integer)}


def _package() -> Any:
    return vendor_tool.module("openvino", "openvino", "pip install 'vdq-export[openvino]'")


def _reason(message: str) -> str:
    """The last line that says something: the first ones name source files."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from")), message)
