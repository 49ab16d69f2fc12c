"""Carry out the plan's block rotation of what linears read, without a cost at run time where the producer can take it.

    x[..., K] · W[K, N]   ->   (x · R ÷ c)[..., K] · (c · Rᵀ · W)[K, N]

R = blockdiag(H, …, H), H orthonormal Hadamard, c[k] > 0 a channel scale (or none); one pair for all that read x.
Exact, as R · Rᵀ = I. Rows of the weights are turned here; x · R goes to one of two places, and the report says which:
- fused: to the columns and bias of the linears that make x, when only layouts and a product with attention weights lie
  between (`carriers`; to_v → attention → to_out, heads being whole blocks). Nobody else may read what changes so.
- explicit: Reshape → MatMul with a constant → Reshape in front of the planned linears alone; other readers keep x. Its
  cost is counted. A Mul that smoothing had to put on the tokens leads here: it does not commute.
÷ c goes where smoothing would go: into the producer's columns, into the matrix of a single block, else a Mul.

A turned weight is renamed "<weight>.rotated-<digest of block and c>", which makes the pass idempotent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PassError, PlanError
from vdq_export.graph import Array, Graph, Linear, Value
from vdq_export.graphs.carriers import Reading, carriers
from vdq_export.hadamard import is_order
from vdq_export.passes._rotation_edits import turn_columns, turn_rows, turn_value
from vdq_export.passes._smoothing_edits import apply
from vdq_export.passes._smoothing_places import Search
from vdq_export.plan import QuantPlan, Rotation

NAME = "rotation"
AFTER = ("linear", "smoothing")
_MARK = re.compile(r"\.rotated-([0-9a-f]{8})(_\d+)?$")


@dataclass(frozen=True)
class _Group:
    """The quantized linears that read `value`, the block and the channel scale c[K] (or none) all of them share."""

    value: Value
    linears: tuple[Linear, ...]
    block: int
    scale: Array

    @property
    def names(self) -> str:
        return ", ".join(linear.name for linear in self.linears)

    @property
    def mark(self) -> str:
        what = str(self.block).encode() + self.scale.tobytes()
        return f".rotated-{hashlib.sha256(what).hexdigest()[:8]}"

    @property
    def reading(self) -> Reading:
        return Reading(self.value, tuple(linear.matmul for linear in self.linears), self.block)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    groups = [] if context.plan is None else list(_groups(graph, context.plan))
    waiting = [group for group in groups if not _is_done(group)]
    report.details += [f"{group.value.name}: rotated before" for group in groups if _is_done(group)]
    turned: set[int] = set()
    last, cost = context.spec is not None and context.spec.every_operator, 0
    for group, found in zip(waiting, carriers(graph, [group.reading for group in waiting]), strict=True):
        value, price = group.value, 0
        if not isinstance(found, str):
            _turn_producers(graph, found, group.block, turned)
        elif group.block > 1:
            value, price = turn_value(graph, value, group.reading.readers, group.block, constants_last=last)
        more = _divide(graph, value, group)
        for linear in group.linears:
            turn_rows(graph, linear.matmul, group.block, group.scale, group.mark)
        cost += price + more
        report.did(_describe(group, found, price, more))
    if report.applied:
        report.details.append(f"multiplied a run: {cost} times")
        graph.cleanup()
    return report


def _turn_producers(graph: Graph, linears: Sequence[Linear], block: int, turned: set[int]) -> None:
    """Each once: values that leave one attention share their producers."""
    for linear in linears:
        if id(linear.matmul) not in turned:
            turned.add(id(linear.matmul))
            turn_columns(graph, linear, block)


def _divide(graph: Graph, value: Value, group: _Group) -> int:
    """÷ c for the group's linears, `value` being what they read now; returns its multiplications a run."""
    if not group.scale.size:
        return 0
    way = Search(graph).value(value, [(linear.matmul, 0) for linear in group.linears], 1 / group.scale)
    for edit in way.edits:
        apply(graph, edit)
    return way.cost


def _groups(graph: Graph, plan: QuantPlan) -> Iterator[_Group]:
    """One group per value that is to be rotated; PassError when its readers disagree."""
    linears = {linear.name: linear for linear in graph.linears()}
    wanted: dict[int, list[tuple[Linear, Rotation | None]]] = {}
    for layer in plan.layers:
        if layer.rotation and layer.name not in linears:
            raise PlanError(f"the plan rotates {layer.name}, which is no linear of the graph")
        if layer.quantized and layer.name in linears:
            linear = linears[layer.name]
            wanted.setdefault(id(linear.value), []).append((linear, layer.rotation))
    for members in wanted.values():
        value, readers = members[0][0].value, tuple(linear for linear, _ in members)
        asked = {(rotation.block, rotation.scale) if rotation else None for _, rotation in members}
        names = ", ".join(linear.name for linear in readers)
        if len(asked) > 1:
            raise PassError(f"layers that read {value.name} disagree on its rotation: {names}")
        if (one := asked.pop()) is None or one == (1, ()):
            continue
        (block, vector), size = one, readers[0].shape[0]
        scale = np.asarray(vector, np.float64)
        if size % block or not is_order(block):
            raise PlanError(f"rotation of {names}: no Hadamard blocks of {block} in {size} channels")
        if scale.shape not in ((0,), (size,)) or not (np.isfinite(scale) & (scale > 0)).all():
            raise PlanError(f"rotation of {names}: {size} finite scales above 0 are needed, or none")
        yield _Group(value, readers, block, scale)


def _is_done(group: _Group) -> bool:
    marks = {found[0] if (found := _MARK.search(linear.weight.name)) else "" for linear in group.linears}
    if any(mark and not mark.startswith(group.mark) for mark in marks) or ("" in marks and len(marks) > 1):
        raise PassError(f"{group.value.name} is rotated in part or otherwise", hint="take the float graph")
    return "" not in marks


def _describe(group: _Group, found: tuple[Linear, ...] | str, price: int, more: int) -> str:
    """Where the rotation went, for whom, at what cost, and why it is not fused."""
    what = f"{group.value.name}: blocks of {group.block}"
    scaled = f"; its channel scale costs {more} multiplications a run" if group.scale.size else ""
    if isinstance(found, str):
        return f"{what} explicit, {price} multiplications a run, for {group.names}; not fused: {found}{scaled}"
    return f"{what} fused into {', '.join(linear.name for linear in found)} for {group.names}{scaled}"
