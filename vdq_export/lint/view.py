"""A graph as a consumer of Q/DQ ONNX reads it: units, that is operators with what is known about each operand.

A DequantizeLinear in front of an operand and the QuantizeLinear behind an output are no operators of their own, they
say how that operand is encoded. Weights are never read: types, shapes, scales and zero points are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.graphs.cut import DEQUANTIZE, QUANTIZE, operators, source

CODES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64", "int32": "i32",
    "bool": "bool", "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2", "float4_e2m1fn": "f4e2m1",
    "float8_e8m0fnu": "f8e8m0",
}  # fmt: skip
_SIGNED = {
    f"{sign}int{bits}": f"{short}{bits}" for sign, short in (("", "s"), ("u", "u")) for bits in (2, 4, 8, 16, 32)
}
_QUANTIZED = _SIGNED | {k: v for k, v in CODES.items() if v[:2] in ("f8", "f4")}


@dataclass(frozen=True)
class Encoding:
    """One Q or DQ node's quantization. scale, zero_point: None where absent or computed in the graph."""

    node: Node
    dtype: str  # of the quantized side, a code: u16, s4, f8e4m3 …
    scale: Array | None
    zero_point: Array | None
    axis: int
    block: int

    @property
    def kind(self) -> str:
        """ "" per tensor, "/c" a scale per channel, "/b" a scale per block."""
        if self.block:
            return "/b"
        shape = self.node.inputs[1].shape or ()
        return "/c" if any(size != 1 for size in shape) else ""  # a size may be a name, "N"

    @property
    def code(self) -> str:
        return self.dtype + self.kind

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest value of an integer encoding with one scale; None for others."""
        if self.scale is None or self.scale.size != 1 or not self.dtype[1:].isdecimal():
            return None
        bits = int(self.dtype[1:])
        lowest = 0 if self.dtype[0] == "u" else -(2 ** (bits - 1))
        zero = 0 if self.zero_point is None else int(self.zero_point.reshape(-1)[0])
        scale = float(self.scale.reshape(-1)[0])
        return scale * (lowest - zero), scale * (lowest + 2**bits - 1 - zero)


@dataclass(frozen=True)
class Operand:
    """An input or output of a unit. `constant`: its values are in the file; `source` is what holds them."""

    value: Value
    encoding: Encoding | None
    constant: bool
    source: Value

    @property
    def code(self) -> str:
        """u16, s8/c, s4/b … when quantized, f32, i64, bool … when not, "none" for an omitted input."""
        if self.encoding is not None:
            return self.encoding.code
        return "none" if not self.value.name else plain_code(self.value)

    @property
    def shape(self) -> tuple[Any, ...] | None:
        found = self.value.shape if self.value.shape is not None else self.source.shape
        return None if found is None else tuple(found)


@dataclass(frozen=True)
class Unit:
    """One operator that computes or moves values. outputs: those that somebody reads (all, when nobody reads any)."""

    node: Node
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]

    @property
    def op(self) -> str:
        """Operator type, "domain::Type" outside ONNX's own domain."""
        return op_name(self.node)

    @property
    def name(self) -> str:
        return node_name(self.node)


class View:
    """Units, Q/DQ nodes and values of one graph."""

    def __init__(self, graph: Graph) -> None:
        graph = _with_shapes(graph)
        self.graph = graph
        self.opset: int = graph.gs.opset
        self.inputs: list[Value] = list(graph.gs.inputs)
        self.outputs: list[Value] = list(graph.gs.outputs)

    @cached_property
    def quantizers(self) -> list[tuple[Node, Encoding]]:
        """Every Q and DQ node, in graph order."""
        return [(n, _encoding(n)) for n in self.graph.nodes if n.op in (QUANTIZE, DEQUANTIZE)]

    @cached_property
    def units(self) -> list[Unit]:
        return [
            Unit(n, tuple(map(_input, n.inputs)), tuple(map(_output, self._read(n.outputs))))
            for n in operators(self.graph)
        ]

    def _read(self, outputs: Sequence[Value]) -> list[Value]:
        ends = {id(value) for value in self.outputs}
        return [value for value in outputs if value.outputs or id(value) in ends] or list(outputs)

    @cached_property
    def by_node(self) -> dict[int, Unit]:
        return {id(unit.node): unit for unit in self.units}

    def makers(self, operand: Operand) -> Iterator[Unit]:
        """The unit that computes an input operand, through any Q and DQ."""
        yield from (self.by_node[id(n)] for n in source(operand.value).inputs)

    def readers(self, operand: Operand) -> Iterator[Unit]:
        """The units that read an output operand, through any Q and DQ; not those inside an If or a Loop."""
        waiting: list[Value] = [operand.value]
        while waiting:
            for node in waiting.pop().outputs:
                if node.op in (QUANTIZE, DEQUANTIZE):
                    waiting.append(node.outputs[0])
                elif id(node) in self.by_node:
                    yield self.by_node[id(node)]


def op_name(node: Node) -> str:
    return node.op if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"


def node_name(node: Node) -> str:
    """Its name; where a foreign file gives none, its first output's."""
    return str(node.name or next((t.name for t in node.outputs if t.name), node.op))


def plain_code(value: Value) -> str:
    """The code of a value that nobody quantizes: f32, i64 … or u8, s8 for raw integers; "?" when unknown."""
    name = _dtype_name(value)
    return CODES.get(name, _SIGNED.get(name, "?"))


def _dtype_name(value: Value) -> str:
    if value.dtype is None:
        return ""
    if isinstance(value.dtype, int):  # graphsurgeon leaves types that numpy lacks as ONNX's number
        return str(onnx.helper.tensor_dtype_to_np_dtype(value.dtype).name)
    return str(np.dtype(value.dtype).name)


def _input(value: Value) -> Operand:
    if value.inputs and value.inputs[0].op == DEQUANTIZE:
        node = value.inputs[0]
        stored = node.inputs[0]
        if not is_constant(stored) and stored.inputs and stored.inputs[0].op == QUANTIZE:
            origin = stored.inputs[0].inputs[0]  # weight quantized in the graph: constant float -> Q -> DQ
            return Operand(value, _encoding(node), is_constant(origin), origin)
        return Operand(value, _encoding(node), is_constant(stored), stored)
    return Operand(value, None, is_constant(value), value)


def _output(value: Value) -> Operand:
    quantizers = [n for n in value.outputs if n.op == QUANTIZE]
    only = quantizers and len(quantizers) == len(value.outputs)
    return Operand(value, _encoding(quantizers[0]) if only else None, False, value)


def _encoding(node: Node) -> Encoding:
    stored = node.inputs[0] if node.op == DEQUANTIZE else node.outputs[0]
    zero_point = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    name = _dtype_name(stored) or (_dtype_name(zero_point) if zero_point is not None else "")
    return Encoding(
        node=node,
        dtype=_QUANTIZED.get(name, name) or "u8",
        scale=_values(node.inputs[1]),
        zero_point=None if zero_point is None else _values(zero_point),
        axis=int(node.attrs.get("axis", 1)),
        block=int(node.attrs.get("block_size", 0)),
    )


def _values(value: Value) -> Array | None:
    return np.asarray(value.values) if is_constant(value) else None


def _with_shapes(graph: Graph) -> Graph:
    """`graph`, with inferred types and shapes where a file leaves them out."""
    if all(t.shape is not None and t.dtype is not None for n in graph.nodes for t in n.outputs if t.name):
        return graph
    proto, arrays = graph.skeleton()
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return graph  # the checks that need shapes say that they are missing
    return Graph.from_proto(proto, arrays, graph.source)


def static(shape: Sequence[Any] | None) -> bool:
    """Known, and every dimension a number."""
    return shape is not None and all(isinstance(size, int | np.integer) and size > 0 for size in shape)
