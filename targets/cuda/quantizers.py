"""One Quantize- or DequantizeLinear node as the kernels take it: codes, their scale, zero and levels.

    [Clip(x, low, high) ->] QuantizeLinear(x, scale, zero point)  ->  q, code = q − 128 for uint8, q for int8 and float8

Scale and zero are Picks from the row of numbers of the bin that runs, or constants of a graph of one bin. A uint8 zero
point is Cast(Pick + 128), so the Pick is the code that zero has; a constant is shifted here. A Clip's bounds become
levels of codes: round(bound / scale) + zero, one pair of them for all bins. Where bins have different levels the Clip
stays a Clip, and the codes behind it get the full range: what is clipped to a level rounds to a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import helper

from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.graphs.match import made_by, scalar
from vdq_export.plan import E4M3_MAX
from vdq_export.targets.cuda._fused import fused_by
from vdq_export.targets.cuda.ops import DOMAIN, SHIFT, line
from vdq_export.weights.number_grid import numpy_type

_TYPES = {"uint8": "int8", "int8": "int8", "float8_e4m3fn": "float8e4m3fn"}
_RANGES = {"int8": (-SHIFT, SHIFT - 1), "float8e4m3fn": (-E4M3_MAX, E4M3_MAX)}
_NEAR = 1e-3  # a bound is a level times a scale, both float32


@dataclass(frozen=True)
class Quantizer:
    """value: what is quantized, in front of the Clip where that became levels. zero: None where it is 0 in all bins."""

    value: Value
    scale: Value
    zero: Value | None
    low: int
    high: int
    dtype: str  # of codes: int8, float8e4m3fn
    axis: int | None = None  # of a scale that is no scalar

    @property
    def attrs(self) -> dict[str, int | str]:
        return {"low_level": self.low, "high_level": self.high, "out_type": self.dtype}

    @property
    def key(self) -> tuple[int | str | bytes, ...]:
        """What is the same for two quantizers with the same numbers in every bin."""
        held = [numbers(one) for one in (self.scale, self.zero) if one is not None]
        return (*(b"" if one is None else one.tobytes() for one in held), self.low, self.high, self.dtype)


def type_name(value: Value) -> str:
    """numpy's name of a value's type; of those that numpy has not itself, graphsurgeon gives ONNX's number."""
    known = value.dtype
    return np.dtype(helper.tensor_dtype_to_np_dtype(known) if isinstance(known, int) else known).name


def code_type(dtype: str) -> np.dtype:
    return np.dtype(numpy_type(dtype))


def numbers(value: Value) -> Array | None:
    """[bins, entries]: what a Pick or a constant holds in each bin; None for anything else."""
    if is_constant(value):
        return np.asarray(value.values).reshape(1, -1)
    pick = fused_by(value, "Pick")
    row = fused_by(pick.inputs[0], "Row") if pick else None
    if pick is None or row is None:
        return None
    start, size = int(pick.attrs["offset"]), prod(pick.attrs.get("shape", ()))
    return np.asarray(row.inputs[0].values[:, start : start + size])


def in_table(graph: Graph, like: Value, entries: Array) -> Value:
    """entries[bins, n] as `like` holds its own: a constant, or a Pick from the row of the bin that runs."""
    entries = np.asarray(entries, np.float32)
    name = f"{like.name}.heads"
    pick = fused_by(like, "Pick")
    if pick is None:
        return graph.constant(graph.fresh(name), entries[0])
    row = pick.inputs[0]
    table = row.inputs[0].inputs[0]
    offset, width = table.values.shape[1], line(entries.shape[1])
    padded = np.pad(entries, ((0, 0), (0, width - entries.shape[1])))
    table.values = np.concatenate([table.values, padded], axis=1)
    row.shape = [offset + width]
    attrs = {"offset": offset, "shape": [entries.shape[1]]}
    shape = [entries.shape[1]]
    return graph.add_node("Pick", [row], graph.fresh(name), dtype=np.float32, shape=shape, attrs=attrs, domain=DOMAIN)


def read(graph: Graph, node: Node) -> Quantizer | str:
    """What a Quantize- or DequantizeLinear does, or why no kernel does it."""
    q = node.outputs[0] if node.op == "QuantizeLinear" else node.inputs[0]
    stored = type_name(q)
    dtype = _TYPES.get(stored)
    if dtype is None:
        return f"{stored} is no type of codes"
    scale = node.inputs[1]
    scales, zero = numbers(scale), _zero(graph, node, stored)
    if scales is None or isinstance(zero, str):
        return zero if isinstance(zero, str) else f"{scale.name} is neither a constant nor a bin's number"
    axis = int(node.attrs.get("axis", 1)) if prod(scale.shape) > 1 else None
    value, (low, high) = node.inputs[0], _RANGES[dtype]
    clip = made_by(value, "Clip") if node.op == "QuantizeLinear" else None
    levels = _levels(clip, scales, zero) if clip else None
    if clip is not None and levels is not None:
        value, (low, high) = clip.inputs[0], (max(low, levels[0]), min(high, levels[1]))
    return Quantizer(value, scale, zero, low, high, dtype, axis)


def same(one: Node, other: Node) -> bool:
    """Whether a QuantizeLinear and a DequantizeLinear (or two of a kind) have the same parameters in every bin."""
    if len(one.inputs) != len(other.inputs) or one.attrs.get("axis", 1) != other.attrs.get("axis", 1):
        return False
    return all(a is b or _equal(a, b) for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True))


def codes_of(value: Value) -> Node | None:
    """The QuantizeLinear whose result `value` is the DequantizeLinear of, with the same parameters."""
    back = made_by(value, "DequantizeLinear")
    there = made_by(back.inputs[0], "QuantizeLinear") if back else None
    return there if back is not None and there is not None and same(back, there) else None


def _number(value: Value) -> tuple[Value, float | None]:
    """(the Pick behind a parameter, what is added to it): Cast(Add(Pick, 128)) for a uint8 zero point."""
    cast = made_by(value, "Cast")
    picked = cast.inputs[0] if cast else value
    plus = made_by(picked, "Add")
    return (plus.inputs[0], scalar(plus.inputs[1])) if plus else (picked, 0.0)


def _equal(one: Value, other: Value) -> bool:
    (first, more), (second, added) = _number(one), _number(other)
    left, right = numbers(first), numbers(second)
    return more == added and left is not None and right is not None and np.array_equal(left, right)


def _zero(graph: Graph, node: Node, dtype: str) -> Value | str | None:
    """The code of zero as a float32 value, None where it is 0 in every bin, or what stands in its place."""
    shift = SHIFT if dtype == "uint8" else 0
    point = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if point is None:
        return _constant(graph, node.name, np.array(-shift, np.float32)) if shift else None
    if is_constant(point):
        codes = np.asarray(point.values, np.float32) - np.float32(shift)
        return _constant(graph, point.name, codes) if codes.any() else None
    pick, added = _number(point)
    found = numbers(pick) if added == shift else None
    if found is None:
        return f"{point.name} is neither a constant nor a bin's number"
    return pick if found.any() else None


def _constant(graph: Graph, name: str, codes: Array) -> Value:
    """One of a name and these numbers: several nodes share it."""
    known = graph.values().get(f"{name}.code")
    if known is not None and is_constant(known) and np.array_equal(known.values, codes):
        return known
    return graph.constant(graph.fresh(f"{name}.code"), codes)


def _levels(clip: Node, scales: Array, zero: Value | None) -> tuple[int, int] | None:
    """(lowest, highest) code that a Clip lets through, None where bins differ or it is no level."""
    zeros = numbers(zero) if zero is not None else np.zeros((1, 1), np.float32)
    found = []
    for bound in clip.inputs[1:3]:
        ends = numbers(bound) if bound.name else None
        if ends is None or zeros is None or scales.shape[1] != 1:
            return None
        exact = ends.astype(np.float64) / scales + zeros
        level = int(np.rint(exact.flat[0]))
        if np.abs(exact - level).max() > _NEAR:
            return None
        found.append(level)
    return (found[0], found[1]) if len(found) == 2 else None
