"""Graphs made by hand for the programs of the CUDA target, and what their tests feed and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from vdq_export.graph import Array


def tensors(feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in feeds.items()}


def only(results: Mapping[str, Any]) -> Any:
    (result,) = results.values()
    return result


def model_of(
    nodes: list[onnx.NodeProto], inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, Any],
) -> onnx.ModelProto:  # fmt: skip
    given, made = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()]
        for ports in (inputs, outputs)
    ]
    held = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "made by hand", given, made, held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("vdq.cuda", 1)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def op(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """Operands by name, in one string; "-" is absent."""
    given, made = ([one.replace("-", "") for one in names.split()] for names in (inputs, outputs))
    return helper.make_node(kind, given, made, f"{made[0]}/{kind}", **attributes)


def stream() -> onnx.ModelProto:
    """Sixteen residual blocks x + small · W of nearly nothing: what a sum in bfloat16 drops."""
    nodes, value = [op("MatMul", "x eye", "h0")], "h0"
    for index in range(16):
        nodes += [op("MatMul", f"{value} w", f"b{index}"), op("Add", f"{value} b{index}", f"h{index + 1}")]
        value = f"h{index + 1}"
    nodes.append(op("Identity", value, "y"))
    eye = np.eye(16, dtype=np.float32)
    return model_of(nodes, {"x": (1, 4, 16)}, {"y": (1, 4, 16)}, {"w": eye / 600, "eye": eye})
