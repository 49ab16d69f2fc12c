"""What it costs to have layers of a bundle in float."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vdq_export.bisect.candidates import Candidate, Place
from vdq_export.bundle import Bundle
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.runtime import families
from vdq_export.weights.external_data import FOUR_BIT
from vdq_export.weights.number_grid import numpy_type


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the fix costs. bytes: of weights, more than before; share: that of the bytes of the bundle.

    float_before, float_after: shares of the multiply-adds of a clip's linears that are in float. bins: whose graphs
    change. sessions_before, sessions_after: that the CPU runtime needs, which bins of one structure share.
    """

    bytes: int
    share: float
    float_before: float
    float_after: float
    bins: tuple[int, ...]
    sessions_before: int
    sessions_after: int


def cost(bundle: Bundle, found: Sequence[Candidate], chosen: frozenset[Place]) -> Cost:
    """What it costs to have those of `found` in float that are `chosen`."""
    members = [one for one in found if one.place in chosen]
    more = 0
    for (weights, name), layer in {(x.weights, x.place.layer): x.plan for x in members}.items():
        quantized = [x.place for x in found if (x.weights, x.place.layer) == (weights, name)]
        more += 0 if any(layer.float_in) else 4 * layer.shape[0] * layer.shape[1]  # else stored already
        more -= _integer_bytes(layer) if chosen.issuperset(quantized) else 0  # nobody reads them any more
    work = {place: n for plan in bundle.plans for place, n in _work(plan).items()}
    in_float = {
        Place(layer.name, one.index)
        for plan in bundle.plans
        for one in plan.bins
        for layer in plan.of_bin(one).layers
        if not layer.quantized
    }
    total = sum(work.values()) or 1
    graphs = [bundle.graph_path(index) for index in range(len(bundle.schedule.bins))]
    alike = {index: number for number, one in enumerate(families.find(graphs)) for index in one.bins}
    structures = {(alike[i], frozenset(x.layer for x in chosen if x.bin == i)) for i in range(len(graphs))}
    return Cost(
        bytes=more,
        share=more / bundle.size,
        float_before=sum(work[place] for place in in_float) / total,
        float_after=sum(work[place] for place in in_float | chosen) / total,
        bins=tuple(sorted({place.bin for place in chosen})),
        sessions_before=len(set(alike.values())),
        sessions_after=len(structures),
    )


def _work(plan: QuantPlan) -> dict[Place, int]:
    """Multiply-adds of each linear of the bins' graphs in one branch of a clip."""
    return {
        Place(layer.name, one.index): layer.rows * layer.shape[0] * layer.shape[1] * max(1, len(one.steps))
        for layer in plan.of_bins().layers
        for one in plan.bins
    }


def _integer_bytes(layer: LayerPlan) -> int:
    assert layer.weight is not None
    k, n = layer.shape
    return k * n // 2 if layer.weight.dtype in FOUR_BIT else k * n * numpy_type(layer.weight.dtype).itemsize
