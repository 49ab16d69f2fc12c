"""Static scales of attention operands: one a head and timestep bin, from the largest magnitudes in the record.

Legend: H heads, D channels a head, C = H·D. q and k as the product of the scores reads them, v as that of the values.

A softmax turns an error of its scores into a relative error of weights, so what counts is the largest q·k; a clipped
outlier is such a one. Scales cover all magnitudes that calibration saw therefore; there is no search.

The record is of the float graph as it was traced. Smoothing and rotation leave q and k as they are, but what the
linear behind an attention shall read may be folded into v: v ÷ s per channel, then v·R in blocks. The record's
magnitudes m[C] follow: m ÷ s exactly, and Σ m / √b over a block of b bounds what a Hadamard matrix makes of it. E4M3
numbers lose nothing on a scale that is a little too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec.structs import replace

from vdq_export.calib.bins import bin_slots
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.transform import Transform
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph, Node, Value, as_linear, is_constant
from vdq_export.graphs import attention
from vdq_export.graphs.attention import Attention
from vdq_export.plan import E4M3_MAX, INT_RANGE, AttentionOperand, AttentionPlan, HeadScales, LayerPlan, QuantPlan

_LAYOUT = ("Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze")  # behind the merge of heads into channels
_TINY = float(np.finfo(np.float32).tiny)


class _Unknown(Exception):
    """Why nothing can be said of an operand."""


def plan_attentions(plan: QuantPlan, graph: Graph, record: CalibrationRecord) -> QuantPlan:
    """`plan` with the attentions of `graph`, the float graph that is quantized with it.

    Raises CalibrationError for a record that knows nothing of heads.
    """
    if not plan.recipe.attention.kinds:
        return plan
    slots = [bin_slots(one, record.slots) for one in plan.bins]
    planner = _Planner(plan, record, slots)
    return replace(plan, attentions=tuple(planner.plan(one) for one in attention.find(graph)))


class _Planner:
    def __init__(self, plan: QuantPlan, record: CalibrationRecord, slots: Sequence[Sequence[int]]) -> None:
        self._wanted, self._record, self._slots = plan.recipe.attention, record, slots
        self._layers = {layer.name: layer for layer in plan.layers}

    def plan(self, one: Attention) -> AttentionPlan:
        made = AttentionPlan(name=one.name, product=str(one.product.name), heads=one.heads)
        if not one.heads:
            shapes = ", ".join(str(list(value.shape or ())) for value in (one.q, one.k, one.v))
            return replace(made, keep_float=f"operands are not [batch, heads, …, …] each: {shapes}")
        scores_why = values_why = "the recipe leaves them in float"
        q = k = v = None
        try:
            if self._wanted.scores == "int8":
                q, k = self._operand(one, "q"), self._operand(one, "k")
                scores_why = ""
        except _Unknown as why:
            scores_why = str(why)
        try:
            if self._wanted.values == "fp8":
                v = self._operand(one, "v", self._carried(one))
                values_why = ""
        except _Unknown as why:
            values_why = str(why)
        if q is None and v is None:
            return replace(made, keep_float=f"scores: {scores_why}; values: {values_why}")
        return replace(made, q=q, k=k, v=v, scores_why=scores_why, values_why=values_why)

    def _operand(self, one: Attention, which: str, carried: Transform | None = None) -> AttentionOperand:
        value = {"q": one.q, "k": one.k, "v": one.v}[which]
        heads, factor = self._seen(value), one.factor(which)
        width = int(value.shape[2 if which == "k" else 3])
        if heads.shape[1] != one.heads or heads.shape[2] not in (1, width):
            raise _Unknown(f"{value.name}: magnitudes {list(heads.shape[1:])} of {one.heads} heads of {width} channels")
        if not factor:
            raise _Unknown(f"{value.name} is multiplied by zero")
        most = E4M3_MAX if which == "v" else INT_RANGE["int8"][1]
        scales = []
        for slots in self._slots:
            seen = np.broadcast_to(heads[np.asarray(slots)].max(axis=0), (one.heads, width))
            largest = (seen if carried is None else _through(seen, carried)).max(axis=1)
            scale = (largest / most).astype(np.float32)
            scale[scale < _TINY] = 1.0
            why = f"largest magnitude of each head, {len(slots)} slots"
            scales.append(HeadScales(scale=tuple(scale.tolist()), why=why))
        dtype: Literal["int8", "float8e4m3fn"] = "float8e4m3fn" if which == "v" else "int8"
        return AttentionOperand(value=str(value.name), dtype=dtype, channels=width, factor=factor, bins=tuple(scales))

    def _seen(self, value: Value) -> Array:
        """Magnitudes [S, H, 1 | D] of a value."""
        if value.name not in self._record.values:
            raise _Unknown(f"{value.name} is no value that was calibrated: the float passes put it there")
        known = self._record.value(value.name)
        if known.kind == "linear":
            raise _Unknown(f"{value.name} is read by {known.readers[0]} too, and calibrated as its input")
        if known.heads is None:
            raise CalibrationError(
                f"{self._record.origin} says nothing about heads of attentions: it was made by an earlier version",
                hint="calibrate again",
            )
        heads: Array = known.heads
        return heads

    def _carried(self, one: Attention) -> Transform | None:
        """What of the smoothing and rotation of the linears behind an attention its values carry; None: nothing."""
        found = {}
        for name, marks, is_merged in _linears_behind(one):
            layer = self._layers.get(name)
            if layer is None or (layer.smoothing is None and layer.rotation is None):
                continue
            if not is_merged or layer.shape[0] != one.heads * int(one.v.shape[3]):
                raise _Unknown(f"{name} is smoothed or rotated, which what lies between may carry to the values")
            transform = _folded(layer, marks)
            found[(transform.smoothing, transform.rotation)] = transform
        if len(found) > 1:
            raise _Unknown("the linears that read the result are smoothed or rotated unlike each other")
        return next(iter(found.values()), None)


def _linears_behind(one: Attention) -> list[tuple[str, str, bool]]:
    """(linear, marks, whether nothing else but the merge of heads lies between) of those that see values' channels.

    marks: what stands on the way of a smoothing ("S", a Mul) and of a rotation ("R", a product), in order.
    """
    found, seen = list[tuple[str, str, bool]](), set[tuple[int, str, bool, bool]]()
    waiting = [(one.product.outputs[0], "", False, True)]
    while waiting:
        value, marks, is_merged, is_plain = waiting.pop()
        if (key := (id(value), marks, is_merged, is_plain)) in seen:
            continue
        seen.add(key)
        for node in value.outputs:
            if (linear := as_linear(node)) is not None:
                found.append((linear.name, marks, is_merged and is_plain))
            elif mark := _mark(node):
                waiting.append((node.outputs[0], (marks + mark)[:2], is_merged, is_plain))
            elif node.op == "Transpose" and not is_merged and list(node.attrs["perm"]) == [0, 2, 1, 3]:
                waiting.append((node.outputs[0], marks, True, is_plain))
            elif "Normalization" not in node.op:
                waiting += [(out, marks, is_merged, is_plain and node.op in _LAYOUT) for out in node.outputs]
    return found


def _mark(node: Node) -> str:
    """What of a smoothing or a rotation that could not be folded is this node."""
    constants = [value for value in node.inputs if is_constant(value)]
    if node.op == "Mul" and "/Mul.smooth" in node.name:
        return "S"
    return "R" if node.op == "MatMul" and constants and len(constants[0].shape) == 3 else ""


def _folded(layer: LayerPlan, marks: str) -> Transform:
    """What is left of a layer's transform, division by s, rotation, division by c, once `marks` stand behind values."""
    if marks.startswith("R"):
        return Transform(layer.smoothing)
    if marks and (marks != "S" or layer.rotation is None):
        return Transform()
    rotation = replace(layer.rotation, scale=()) if marks and layer.rotation is not None else layer.rotation
    return Transform(layer.smoothing, rotation)


def _through(seen: Array, carried: Transform) -> Array:
    """Magnitudes [H, D] of values, as bounded behind what they carry."""
    most = seen.reshape(-1).astype(np.float64)
    if carried.scale is not None:
        most = most / carried.scale
    if carried.rotation is not None:
        block = carried.rotation.block
        most = np.repeat(most.reshape(-1, block).sum(axis=1) / np.sqrt(block), block)
    bounds: Array = (most if carried.after is None else most / carried.after).reshape(seen.shape)
    return bounds
