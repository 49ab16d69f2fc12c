"""Carry out the plan's channel smoothing, without a cost at run time wherever the graph allows it.

    x[..., K] · W[K, N]   ->   (x ÷ s)[..., K] · (s · W)[K, N]        s[k] > 0, one vector for all linears that read x

Exact. Rows of the weights are multiplied here; ÷ s goes to the cheapest of five places (`_smoothing_places`), and the
report says which, and why none of the cheaper ones:
1. LayerNorm/RMSNorm weight and bias. 2. The constants of the producer, when only ops that commute with a channel factor
lie between (to_v → attention → to_out). 4. The linear that makes AdaLN's γ, β, when nobody else reads them. 3. A Mul on
those per-sample vectors. 5. A Mul on the tokens, its cost counted.
A linear kept in float that reads x too gets its rows multiplied when x itself changes; any other reader forces place 5.

A smoothed weight is renamed "<parameter>.smoothed-<digest of s>", which makes the pass idempotent. Places 2 and 4
divide columns of the producer's weight: numbers of its quantizer are chosen from the graph this pass leaves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PassError, PlanError
from vdq_export.graph import Array, Graph, Linear, Value, as_linear
from vdq_export.passes._smoothing_edits import Insert, apply, multiply
from vdq_export.passes._smoothing_places import ORDER, Search, Way
from vdq_export.plan import QuantPlan, Smoothing

NAME = "smoothing"
AFTER = ("linear",)
_MARK = re.compile(r"\.smoothed-([0-9a-f]{8})(_\d+)?(?=\.rotated-|$)")
_PLACES = {1: "norm weight", 2: "producer's constants", 4: "modulation constants", 3: "modulation vector", 5: "tokens"}
_ABSENT = {1: "no norm weight reaches all of it", 2: "no producer's constants reach all of it"}


@dataclass(frozen=True)
class _Group:
    """The quantized linears that read `value`, and the vector s[K] all of them share."""

    value: Value
    linears: tuple[Linear, ...]
    scale: Array

    @property
    def names(self) -> str:
        return ", ".join(linear.name for linear in self.linears)

    @property
    def mark(self) -> str:
        return f".smoothed-{hashlib.sha256(self.scale.tobytes()).hexdigest()[:8]}"


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    cost = dict.fromkeys(ORDER, 0)
    for group in [] if context.plan is None else list(_groups(graph, context.plan)):
        if _is_done(group):
            report.details.append(f"{group.value.name}: smoothed before")
            continue
        way, readers = _decide(graph, group)
        for edit in way.edits:
            apply(graph, edit)
        for linear in readers:
            multiply(graph, linear.matmul, 1, group.scale[:, None], group.mark)
        cost[way.place] += way.cost
        report.did(_describe(group, way))
    if report.applied:
        report.details.append(f"multiplied a run: {cost[5]} elements of tokens, {cost[3]} of per-sample vectors")
        graph.cleanup()
    return report


def _groups(graph: Graph, plan: QuantPlan) -> Iterator[_Group]:
    """One group per value that is to be smoothed; PassError when its readers disagree."""
    linears = {linear.name: linear for linear in graph.linears()}
    wanted: dict[int, list[tuple[Linear, Smoothing | None]]] = {}
    for layer in plan.layers:
        if layer.smoothing and layer.name not in linears:
            raise PlanError(f"the plan smooths {layer.name}, which is no linear of the graph")
        if layer.quantized and layer.name in linears:
            linear = linears[layer.name]
            wanted.setdefault(id(linear.value), []).append((linear, layer.smoothing))
    for members in wanted.values():
        group = _Group(members[0][0].value, tuple(linear for linear, _ in members), np.zeros(0))
        vectors = {smoothing.scale if smoothing else None for _, smoothing in members}
        if len(vectors) > 1:
            raise PassError(f"layers that read {group.value.name} disagree on its smoothing: {group.names}")
        vector = vectors.pop()
        if vector is None or set(vector) == {1.0}:
            continue
        scale, size = np.asarray(vector), members[0][0].shape[0]
        if scale.shape != (size,) or not (np.isfinite(scale) & (scale > 0)).all():
            raise PlanError(f"smoothing of {group.names}: {size} finite scales above 0 are needed")
        yield _Group(group.value, group.linears, scale)


def _is_done(group: _Group) -> bool:
    marks = {found[0] if (found := _MARK.search(linear.weight.name)) else "" for linear in group.linears}
    if any(mark and not mark.startswith(group.mark) for mark in marks) or ("" in marks and len(marks) > 1):
        raise PassError(f"{group.value.name} is smoothed in part or with other scales", hint="take the float graph")
    return "" not in marks


def _decide(graph: Graph, group: _Group) -> tuple[Way, tuple[Linear, ...]]:
    """The cheapest way, and the linears whose rows need multiplying: all that read the value if it changes itself."""
    everyone = tuple(linear for node in group.value.outputs if (linear := as_linear(node)) is not None)
    way = Search(graph).value(group.value, [(linear.matmul, 0) for linear in everyone], 1 / group.scale)
    first = way.edits[0]
    if not isinstance(first, Insert) or first.value is not group.value:
        return way, everyone
    planned = tuple((linear.matmul, 0) for linear in group.linears)
    return dataclasses.replace(way, edits=(dataclasses.replace(first, edges=planned),)), group.linears


def _describe(group: _Group, way: Way) -> str:
    """Which place, at what cost, for whom, and why none of the cheaper ones."""
    cost = f", {way.cost} elements a run" if way.cost else ""
    parts = [f"{group.value.name}: place {way.place} ({_PLACES[way.place]}{cost}) for {group.names}"]
    for place in ORDER[1 : ORDER.index(way.place)]:
        reasons = dict.fromkeys(why for where, why in way.refused if where == place)
        parts.append(f"not {place}: {', '.join(reasons) or _ABSENT.get(place, 'no per-sample modulation on the way')}")
    return "; ".join(parts)
