"""From the graph that onnxruntime verified to the types TensorRT is to run: a strongly typed build adds none itself.

four_bits(): NVFP4's numbers, FLOAT8E4M3FN in the verified graph, become FLOAT4E2M1; no number changes.
half(): float parts in FP16 or BF16, with what loses its meaning there left in FP32:
  - squares, means, roots, quotients and norms (a square of 300 overflows FP16, an epsilon of 1e-6 is rounded away),
  - all that leads to a sine or cosine (timesteps up to 1000 need their fraction),
  - NVFP4's scales, whose two levels are multiplied in FP32.
Nodes that only move values keep the type they find. Inputs and outputs of the graph stay FP32, Casts stand inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from vdq_export.errors import PassError
from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.handoff.trt_functions import DOMAIN, FP4, MXFP8_DEQUANTIZE, functions
from vdq_export.weights.number_grid import numpy_type

HALF = {"fp16": "float16", "bf16": "bfloat16"}
LOSS = 0.01  # share of a scale that rounding it may cost
_WIDE = {
    "Pow", "ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Div", "Reciprocal", "Exp", "Log", "Sin", "Cos",
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization",
}  # fmt: skip
_MOVES = {
    "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Gather", "Expand", "Identity",
    "Flatten", "Tile", "Pad",
}  # fmt: skip
_OPSET, _IR = 23, 11  # the first ONNX with FLOAT4E2M1, its file format; BF16 convolutions came in opset 22


def four_bits(graph: Graph) -> int:
    """Edits `graph`; returns how many weights and activations are in four bits now."""
    narrow, done = numpy_type("float4e2m1"), 0
    for node in graph.nodes:
        numbers = node.inputs[0] if node.inputs else None
        if (
            node.op == "DequantizeLinear"
            and numbers is not None
            and is_constant(numbers)
            and numbers.name.endswith(".nvfp4")
        ):
            numbers.values = numbers.values.astype(narrow)
            done += 1
        elif node.op == FP4 and node.domain == DOMAIN:
            node.outputs[0].dtype = narrow
            done += 1
    if done:
        _raise_opset(graph)
    return done


def half(graph: Graph, isa: str) -> int:
    """Edits `graph` for isa "fp16" or "bf16"; returns the number of nodes computed in it.

    Raises PassError for a scale that the type cannot hold.
    """
    if isa == "bf16":
        _raise_opset(graph)
    return _Halving(graph, numpy_type(HALF[isa])).run()


class _Halving:
    """One walk in graph order: a node's type is known when its turn comes, and its operands are cast to it."""

    def __init__(self, graph: Graph, narrow: Any) -> None:
        self.graph = graph
        self.narrow: np.dtype[Any] = np.dtype(narrow)
        self.wide: np.dtype[Any] = np.dtype(np.float32)
        self.cast: dict[tuple[int, str], Value] = {}
        self.exact = _leads_to(graph, {"Sin", "Cos"})

    def run(self) -> int:
        self.graph.cleanup()
        count = 0
        for node in self.graph.nodes:
            kind = self._kind(node)
            for index, value in enumerate(node.inputs):
                if value.dtype in (self.wide, self.narrow) and node.op != "Cast":
                    node.inputs[index] = self._as(value, self._of_input(node, index, kind))
            if node.op == MXFP8_DEQUANTIZE:
                node.attrs["output_dtype"] = _onnx_type(kind)
            made = [v for v in node.outputs if v.dtype == self.wide and node.op != "Cast"]
            for value in made:
                value.dtype = kind
            count += bool(made) and kind == self.narrow
        for index, value in enumerate(self.graph.gs.outputs):
            if value.dtype == self.narrow:
                maker, name = value.inputs[0], value.name
                value.name = self.graph.fresh(f"{name}/Half")
                maker.name = value.name if maker.name == name else maker.name  # node names are unique, too
                self.graph.gs.outputs[index] = self._cast(value, self.wide, name)
        self.graph.cleanup()
        return count

    def _kind(self, node: Node) -> np.dtype[Any]:
        values = [v for v in node.inputs if v.dtype in (self.wide, self.narrow)]
        if id(node) in self.exact or node.op in _WIDE:
            return self.wide
        if node.op == "Mul" and node.inputs[0] is node.inputs[1]:
            return self.wide
        if node.op == "Add" and any(v.inputs and v.inputs[0].op == "ReduceMean" for v in values):
            return self.wide
        if node.op == "DequantizeLinear":
            scales = any(
                reader.op == node.op and reader.inputs[1] is node.outputs[0] for reader in node.outputs[0].outputs
            )
            return self.narrow if is_constant(node.inputs[1]) and not scales else self.wide
        if node.op in _MOVES and values and all(v.dtype == self.wide and not is_constant(v) for v in values):
            return self.wide
        return self.narrow

    def _of_input(self, node: Node, index: int, kind: np.dtype[Any]) -> np.dtype[Any]:
        return self.wide if node.op == FP4 and index == 1 else kind

    def _as(self, value: Value, kind: np.dtype[Any]) -> Value:
        if value.dtype == kind:
            return value
        key = (id(value), str(kind))
        if key not in self.cast:
            name = self.graph.fresh(f"{value.name}.{kind.name}")
            if is_constant(value):
                self.cast[key] = self.graph.constant(name, self._rounded(value, kind))
            else:
                self.cast[key] = self._cast(value, kind, name)
        return self.cast[key]

    def _rounded(self, value: Value, kind: np.dtype[Any]) -> Array:
        found: Array = value.values.astype(kind)
        if any(reader.op in ("QuantizeLinear", "DequantizeLinear") for reader in value.outputs):
            error = np.abs(found.astype(np.float32) - value.values) / value.values
            if not np.max(error, initial=0.0) < LOSS:
                raise PassError(f"{value.name}: a scale that {kind.name} cannot hold", hint="export with --isa fp32")
        return found

    def _cast(self, value: Value, kind: np.dtype[Any], name: str) -> Value:
        attrs = {"to": _onnx_type(kind)}
        return self.graph.add_node("Cast", [value], name, dtype=kind, shape=value.shape, attrs=attrs)


def _raise_opset(graph: Graph) -> None:
    """To the ONNX that has FLOAT4E2M1 and BF16 convolutions; functions have to follow."""
    graph.gs.opset, graph.gs.ir_version = max(graph.gs.opset, _OPSET), max(graph.gs.ir_version, _IR)
    graph.gs.import_domains = None  # those of the older opset
    used = {node.op: node for node in graph.nodes if node.domain == DOMAIN}
    four = FP4 in used and used[FP4].outputs[0].dtype == numpy_type("float4e2m1")
    graph.gs.functions.clear()
    for name in used:
        graph.define(functions(graph.gs.opset, four_bits=four)[name])


def _leads_to(graph: Graph, ops: set[str]) -> set[int]:
    """Nodes whose results such an operator depends on, by id."""
    found: set[int] = set()
    waiting = [node for node in graph.nodes if node.op in ops]
    while waiting:
        node = waiting.pop()
        if id(node) not in found:
            found.add(id(node))
            waiting += [maker for value in node.inputs for maker in value.inputs]
    return found


def _onnx_type(kind: np.dtype[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(kind))
