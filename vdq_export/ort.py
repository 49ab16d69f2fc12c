"""onnxruntime sessions over graphs that are still in memory; weights are handed over, not copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from vdq_export.graph import Array, Graph
from vdq_export.weights.external_data import FOUR_BIT


def session(
    graph: Graph,
    *,
    outputs: Sequence[str] = (),
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
    optimised_path: str | None = None,
    exact: bool = False,
    provider: str = "CPUExecutionProvider",
) -> ort.InferenceSession:
    """A session of `graph`, on CPUs by default; `outputs` names inner values to return as well.

    options: onnxruntime session config entries. optimised_path: write the optimised graph there. exact: every operator
    as it stands, none fused or replaced by an integer kernel.
    """
    proto, arrays = graph.skeleton()
    declared = {o.name for o in proto.graph.output}
    infos = {v.name: v for v in proto.graph.value_info}
    for name in outputs:
        if name not in declared:
            proto.graph.output.append(infos.get(name, onnx.ValueInfoProto(name=name)))
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if exact:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads:
        settings.intra_op_num_threads = threads
    for key, value in (options or {}).items():
        settings.add_session_config_entry(key, value)
    if optimised_path:
        settings.optimized_model_filepath = optimised_path
    for tensor in proto.graph.initializer:
        if tensor.name in arrays and arrays[tensor.name].dtype.name in FOUR_BIT:
            # onnxruntime takes no 4-bit arrays from numpy: packed into the model, half a byte each.
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(arrays.pop(tensor.name)), tensor.name))
    names = list(arrays)
    values = [_value(np.ascontiguousarray(arrays[n])) for n in names]
    settings.add_external_initializers(names, values)
    return ort.InferenceSession(
        proto.SerializeToString(), settings, providers=list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    )


def _value(array: Array) -> ort.OrtValue:
    """The array as onnxruntime sees it; of types numpy does not have itself it wants the bytes and the ONNX type."""
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array)
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.dtype.itemsize}"), kind)


def run(
    graph: Graph, feeds: Mapping[str, Array], outputs: Sequence[str] = (), **session_arguments: Any
) -> dict[str, Array]:
    """Run once; {name: array} of the graph's outputs and of the inner values named in `outputs`."""
    made = session(graph, outputs=outputs, **session_arguments)
    names = [o.name for o in made.get_outputs()]
    return dict(zip(names, made.run(names, dict(feeds)), strict=True))
