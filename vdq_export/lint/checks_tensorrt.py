"""Checks of what TensorRT publishes about Q/DQ: which types, at which granularity, with which scales."""

from __future__ import annotations

from collections.abc import Iterator

from vdq_export.graph import Node, Value, is_constant
from vdq_export.graphs.cut import QUANTIZE, source
from vdq_export.lint.checks import Check, Hit, Scope
from vdq_export.lint.view import Encoding, Unit, op_name, plain_code

_FLOATS = ("f32", "f16", "bf16")
_WIDTHS = {"s8": "int8", "f8e4m3": "fp8"}


class QuantizedTypes(Check, frozen=True, tag="quantized_types"):
    """A Q or DQ of another type than those of `since` (type -> opset), or before the opset that has its type."""

    since: dict[str, int]

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            if encoding.dtype not in self.since:
                yield Hit.at(node, f"{encoding.dtype} is none of {', '.join(self.since)}")
            elif scope.view.opset < self.since[encoding.dtype]:
                yield Hit.at(node, f"{encoding.dtype} needs opset {self.since[encoding.dtype]}, not {scope.view.opset}")


class Granularity(Check, frozen=True, tag="granularity"):
    """A computed or stored (`weights`) tensor of `dtype` with other scales than `kinds` ("", "/c", "/b") allows."""

    dtype: str
    kinds: tuple[str, ...]
    weights: bool

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            asked = encoding.dtype == self.dtype and _is_weight(node) == self.weights
            if asked and not _by_operator(node) and encoding.kind not in self.kinds:
                yield Hit.at(node, f"a {'weight' if self.weights else 'computed value'} in {encoding.code}")


class BlockShape(Check, frozen=True, tag="block_shape"):
    """Blocks of `dtype` of other sizes than `sizes`, or along a dimension before the last two."""

    dtype: str
    sizes: tuple[int, ...]

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            if encoding.dtype != self.dtype or not encoding.block:
                continue
            if encoding.block not in self.sizes:
                yield Hit.at(node, f"blocks of {encoding.block}, not {' or '.join(map(str, self.sizes))}")
            rank = len(node.inputs[0].shape or ())
            if rank and encoding.axis % rank < rank - 2:
                yield Hit.at(node, f"blocks along axis {encoding.axis % rank} of {rank}")


class ScaleType(Check, frozen=True, tag="scale_type"):
    """A stored scale that is no float, or a Q whose scale has another type than what it quantizes."""

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, _ in scope.view.quantizers:
            scale, found = node.inputs[1], plain_code(node.inputs[1])
            if is_constant(scale) and found not in _FLOATS:
                yield Hit.at(node, f"its scale is stored as {found}")
            elif node.op == QUANTIZE and found != plain_code(node.inputs[0]):
                yield Hit.at(node, f"a scale of {found} for a value of {plain_code(node.inputs[0])}")


class BothOperands(Check, frozen=True, tag="both_operands"):
    """A product whose operands are not both in one of INT8 and FP8: the quantized one is dequantized in front of it.

    Weights in 4 bits stand beside float by design.
    """

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        kinds = [_kind(o.encoding) for o in unit.inputs[:2]]
        known = [k for k in kinds if k in _WIDTHS.values()]
        if known and kinds[0] != kinds[1]:
            yield f"{kinds[0]} times {kinds[1]}"


class DynamicBlocks(Check, frozen=True, tag="dynamic_blocks"):
    """A dynamic quantizer with another block size, axis, rank or (`unit`) scale than the operator takes."""

    block: int
    unit_input: bool = False
    ranks: tuple[int, ...] = (2, 3)

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        node, shape = unit.node, unit.inputs[0].shape or ()
        rank, axis = len(shape), node.attrs.get("axis")
        if rank and rank not in self.ranks:
            yield f"a value of rank {rank}, not {' or '.join(map(str, self.ranks))}"
        if axis is None or (rank and axis % rank < rank - 2):
            yield "the axis is not given" if axis is None else f"blocks along axis {axis} of {rank}"
        if node.attrs.get("block_size") != self.block:
            yield f"blocks of {node.attrs.get('block_size')}, not {self.block}"
        elif rank and axis is not None and isinstance(shape[axis], int) and shape[axis] % self.block:
            yield f"{shape[axis]} values in blocks of {self.block}"
        if self.unit_input and not (len(node.inputs) > 1 and _is_scalar(node.inputs[1])):
            yield "its scale is no stored scalar"


def _is_weight(node: Node) -> bool:
    """Whether what a Q or DQ handles is stored in the file."""
    return is_constant(source(node.inputs[0]))


def _by_operator(node: Node) -> bool:
    """A DQ of what a dynamic quantizer puts out, numbers or scales."""
    makers = node.inputs[0].inputs
    return bool(makers) and op_name(makers[0]).startswith("trt::")


def _kind(encoding: Encoding | None) -> str:
    return "float" if encoding is None else _WIDTHS.get(encoding.dtype, encoding.dtype)


def _is_scalar(value: Value) -> bool:
    return is_constant(value) and value.values.size == 1
