"""What the page draws of the activation ranges: by layer what calibration saw, and the boxes its quantizers got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vdq_export.bundle import Bundle
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.report.content import Content
from vdq_export.report.networks import network_name
from vdq_export.report.ranges import NetworkRanges, ValueRanges


def numbers(content: Content) -> list[dict[str, Any]]:
    """One object an expert: {"name", "t", "branch": of its slots, "edges", "values": by value its observed ranges, with
    None where a slot has none, and "layers": [name, why there are no boxes or "", number of its boxes in "boxes"]}.
    """
    found = content.ranges.networks if content.ranges else ()
    made = []
    for expert, plans in _experts(content.bundle).items():
        names = {network_name(plan, content.bundle.plans) for plan in plans}
        mine = [one for one in found if one.name in names]
        if mine:
            made.append(_of_expert(expert, plans, mine))
    return made


def _experts(bundle: Bundle) -> dict[str, list[QuantPlan]]:
    found: dict[str, list[QuantPlan]] = {}
    for plan in bundle.plans:
        found.setdefault(plan.expert, []).append(plan)
    return found


def _of_expert(expert: str, plans: Sequence[QuantPlan], networks: Sequence[NetworkRanges]) -> dict[str, Any]:
    """networks: one, or one a bin with weights of its own; their slots follow each other."""
    slots = [
        (t, branch, number, place)
        for number, one in enumerate(networks)
        for place, (t, branch) in enumerate(zip(one.t, one.branch, strict=True))
    ]
    slots.sort(key=lambda slot: -slot[0])
    known = [{value.value: value for value in one.values} for one in networks]
    layers = [{layer.name: layer for layer in plan.layers} for plan in plans]
    values = []
    for name in dict.fromkeys(name for one in known for name in one):
        by_network = [one.get(name) for one in known]
        columns = [_column(by_network, what, slots) for what in ("lo", "hi", "after_lo", "after_hi")]
        readers = dict.fromkeys(layer for one in by_network if one is not None for layer in one.layers)
        boxes: list[list[Any]] = []
        told = []
        for reader in readers:
            mine = [one.get(reader) for one in layers]
            own = _boxes(plans, mine)
            if own not in boxes:
                boxes.append(own)
            told.append([reader, "" if own else _why_none(mine), boxes.index(own)])
        seen = dict(zip(("lo", "hi", "afterLo", "afterHi"), columns, strict=True))
        values.append({"value": name, "layers": told, "boxes": boxes, **seen})
    ends = sorted({t for plan in plans for one in plan.bins for t in one.t}, reverse=True)
    t, branch = [slot[0] for slot in slots], [slot[1] for slot in slots]
    return {"name": expert, "t": t, "branch": branch, "edges": ends, "values": values}


def _column(
    networks: Sequence[ValueRanges | None], what: str, slots: Sequence[tuple[float, str, int, int]]
) -> list[float | None]:
    """One number a slot; [] where no network has any. Without smoothing in one network, it is as the value itself."""
    if not any(getattr(one, what) for one in networks if one is not None):
        return []
    plain = what.removeprefix("after_")
    rows = [() if one is None else getattr(one, what) or getattr(one, plain) for one in networks]
    return [rows[number][place] if rows[number] else None for _, _, number, place in slots]


def _boxes(plans: Sequence[QuantPlan], layers: Sequence[LayerPlan | None]) -> list[list[Any]]:
    """[label, lowest t, highest t, lo, hi, why, branch] of each static quantizer; layers: in each plan."""
    found = []
    for plan, layer in zip(plans, layers, strict=True):
        for place, (one, chosen) in enumerate(zip(plan.bins, layer.activation if layer else (), strict=False)):
            if layer is not None and layer.in_bin(place).quantized:
                label = " ".join(filter(None, (one.name, plan.precision, one.branch if one.branch != "any" else "")))
                found.append([label, one.t[0], one.t[1], chosen.lo, chosen.hi, chosen.why, one.branch])
    return found


def _why_none(layers: Sequence[LayerPlan | None]) -> str:
    """Why a layer has no box at all."""
    here = [one for one in layers if one is not None and one.quantized]
    if not here:
        return "the layer is in float"
    if any(one.dynamic for one in here):
        return "no static range: its quantizers look at run time"
    if any(one.activation_dtype == "float" for one in here):
        return "its activations stay float"
    return "the layer is in float in every bin" if any(one.float_in for one in here) else "no static range"
