"""Which linears can carry a block rotation of a value in their columns, so that nothing of it remains at run time.

    (P · (x·W + b)) · H = P · (x·(W·H) + b·H)         H acts on blocks of b channels, P (attention) on the tokens

Rotating all blocks alike commutes with everything that only moves whole blocks. Followed upwards from the value:
layout ops (Reshape, Transpose …), Split, Slice and Concat of tokens, the right operand of a MatMul, up to the linears.
What else reads a value on the way must want the same rotation: streams that meet in one attention are decided together.

Where blocks lie needs one number: channels 0 … b−1 of a block stand `stride` elements apart in the flattened value.
Reshape leaves it alone; the other ops need each block to lie within one dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from vdq_export.graph import Graph, Linear, Node, Value, as_linear, is_constant
from vdq_export.graphs.match import integers

_REGROUP = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_LAYOUT = (*_REGROUP, "Transpose", "Split", "Slice", "Concat")
_Edge = tuple[int, int, int, int]  # node, operand, block, stride


@dataclass(frozen=True)
class Reading:
    """`readers` are to see `value`[..., K] with its channels rotated in blocks of `block`."""

    value: Value
    readers: tuple[Node, ...]
    block: int


@dataclass
class _Way:
    """What changes on the way from a value up to its linears."""

    block: int
    linears: list[Linear] = field(default_factory=list)
    values: list[tuple[Value, int]] = field(default_factory=list)  # and the stride there
    edges: set[_Edge] = field(default_factory=set)


class _Refused(Exception):
    """Why the rotation does not get past a node."""


def carriers(graph: Graph, readings: Sequence[Reading]) -> list[tuple[Linear, ...] | str]:
    """For each reading the linears whose columns, rotated in its blocks, give it; or why none can. Edits nothing.

    Those found hold together: do all of them, each linear once.
    """
    found: list[_Way | str] = [_way(reading) for reading in readings]
    outputs = {id(o) for o in graph.gs.outputs}
    settled = False
    while not settled:
        ways = [way for way in found if isinstance(way, _Way)]
        edges = set[_Edge]().union(*(way.edges for way in ways))
        reasons = [_conflict(way, edges, outputs) if isinstance(way, _Way) else "" for way in found]
        found = [why or way for way, why in zip(found, reasons, strict=True)]
        settled = not any(reasons)
    return [way if isinstance(way, str) else tuple(way.linears) for way in found]


def head_width(value: Value) -> int:
    """Channels a head of the attention whose merged heads `value` is, 0 if it is none."""
    while value.inputs and value.inputs[0].op in _LAYOUT:
        value = value.inputs[0].inputs[0]
    node = value.inputs[0] if value.inputs else None
    attends = node is not None and node.op == "MatMul" and not is_constant(node.inputs[1])
    return int(value.shape[-1]) if attends and value.shape else 0


def _way(reading: Reading) -> _Way | str:
    way = _Way(reading.block, edges={(id(node), 0, reading.block, 1) for node in reading.readers})
    try:
        _follow(reading.value, 1, way)
    except _Refused as why:
        return str(why)
    return way


def _follow(value: Value, stride: int, way: _Way) -> None:
    """Go from `value`, whose blocks are to be rotated, to the operands that must be so for it."""
    if not value.inputs or value.shape is None:
        raise _Refused(f"{value.name} is an input of the graph" if value.shape else f"{value.name}: unknown shape")
    way.values.append((value, stride))
    node, axis, last = value.inputs[0], _axis(value, stride, way.block), len(value.shape) - 1
    linear = as_linear(node) or next((x for t in node.inputs for m in t.inputs if (x := as_linear(m))), None)
    if linear is not None and linear.output is value:
        if axis != last or stride != 1:
            raise _Refused(f"the columns of {linear.name} are laid out in a way not known")
        way.linears.append(linear)
        return
    for index, theirs in _operands(node, value, axis, stride, way):
        operand = node.inputs[index]
        way.edges.add((id(node), index, way.block, theirs))
        _follow(operand, theirs, way)


def _operands(node: Node, value: Value, axis: int, stride: int, way: _Way) -> list[tuple[int, int]]:
    """Operands of `node` to rotate, each with the stride of its blocks."""

    def moved(other: Value, to: int) -> int:
        return stride // int(prod(value.shape[axis + 1 :])) * int(prod(other.shape[to + 1 :]))

    if node.op not in (*_LAYOUT, "MatMul") or any(t.shape is None for t in node.inputs):
        raise _Refused(f"{node.name} ({node.op}) does not commute with a rotation of the channels")
    if node.op in _REGROUP:
        return [(0, stride)]
    if axis < 0 or axis in _cut(node, len(value.shape)):
        raise _Refused(f"{node.name} ({node.op}) divides blocks of {way.block} channels")
    if node.op == "MatMul":
        if axis != len(value.shape) - 1 or is_constant(node.inputs[1]) or len(node.inputs[1].shape) < 2:
            raise _Refused(f"{node.name}: its right operand's columns are not the channels")
        return [(1, stride)]
    if node.op == "Transpose":
        source = node.attrs.get("perm", list(range(len(value.shape)))[::-1])[axis]
        return [(0, moved(node.inputs[0], source))]
    if node.op in ("Split", "Slice"):
        way.values += [(part, moved(part, axis)) for part in node.outputs if part is not value]
        return [(0, moved(node.inputs[0], axis))]
    return [(index, moved(part, axis)) for index, part in enumerate(node.inputs)]


def _cut(node: Node, rank: int) -> list[int]:
    """Dimensions that `node` divides or joins; all where that is not known."""
    if node.op in ("Split", "Concat"):
        return [node.attrs.get("axis", 0) % rank]
    if node.op != "Slice":
        return []
    axes = integers(node.inputs[3]) if len(node.inputs) > 3 else None
    return list(range(rank)) if axes is None else [axis % rank for axis in axes]


def _axis(value: Value, stride: int, block: int) -> int:
    """The dimension in which the blocks lie, -1 if they lie across several."""
    inner = 1
    for axis in range(len(value.shape) - 1, -1, -1):
        outer = inner * value.shape[axis]
        if stride % inner == 0 and outer % (block * stride) == 0:
            return axis
        inner = outer
    return -1


def _conflict(way: _Way, edges: set[_Edge], outputs: set[int]) -> str:
    """Who reads a value on the way and does not want it rotated so, or nothing."""
    for value, stride in way.values:
        if id(value) in outputs:
            return f"{value.name} is also an output of the graph"
        for node in value.outputs:
            wanted = {(id(node), i, way.block, stride) for i, t in enumerate(node.inputs) if t is value}
            if not wanted <= edges:
                return f"{value.name} is also read by {node.name}"
    return ""
