"""The heat map's cells: everything that is known of one layer in one bin, in words and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from vdq_export.graph import OUTPUT as MEASURED_OUTPUT
from vdq_export.metrics import LIMIT_DB
from vdq_export.plan import Bin, LayerPlan
from vdq_export.report.content import Content
from vdq_export.report.data import LayerQuality
from vdq_export.report.networks import network_name

OUTPUT = "network output"
REPEATED = ("when", "worst", "numbers", "range", "clip", "alpha", "rank", "place", "why")


@dataclass(frozen=True)
class Cell:
    """One layer in one bin, as the page shows it. sqnr_db: None where nothing was measured.

    state: "ok", "low" (below the recipe's threshold), "float" (not quantized) or "open" (not measured).
    """

    layer: str
    bin: str
    when: str
    sqnr_db: float | None
    state: str
    sqnr: str
    worst: str
    numbers: str
    range: str
    clip: str
    alpha: str
    rank: str
    place: str
    why: str


def cells(content: Content) -> list[Cell]:
    """All cells: bin by bin, layers in the order of the network, its output last."""
    measured = {(one.layer, one.bin): one for one in content.verify.layers} if content.verify else {}
    found = []
    for plan in content.bundle.plans:
        limit = plan.recipe.verify.min_layer_sqnr_db
        network = network_name(plan, content.bundle.plans)
        places = content.passes.places(network) if content.passes else {}
        for one in plan.bins:
            place = plan.place(one)
            for layer in plan.layers:
                quality = measured.pop((layer.name, one.index), None)
                found.append(_cell(layer, one, place, quality, limit, _folded(layer, places)))
            output = measured.pop((MEASURED_OUTPUT, one.index), None)
            found += [] if output is None else [_output(one, output, limit)]
    return found


def columns(found: Sequence[Cell]) -> tuple[dict[str, list[Any]], list[str]]:
    """(one list a field, texts): of the fields in REPEATED a cell has the number of its text. Most are a layer's or a
    bin's, and stand once however many bins or layers there are.
    """
    numbers: dict[str, int] = {}
    data = {}
    for name in Cell.__annotations__:
        column = [getattr(one, name) for one in found]
        data[name] = [numbers.setdefault(text, len(numbers)) for text in column] if name in REPEATED else column
    return data, list(numbers)


def _folded(layer: LayerPlan, places: Mapping[str, str]) -> str:
    """Where its smoothing and rotation went; places: of the same set of weights."""
    if layer.smoothing is None and layer.rotation is None:
        return "nothing folded"
    return places.get(layer.value, "not told: made by an earlier version")


def _output(one: Bin, quality: LayerQuality, limit: float) -> Cell:
    return Cell(
        layer=OUTPUT,
        bin=one.name,
        when=when(one),
        **_measured(quality, limit, True),
        numbers="float",
        range="",
        clip="",
        alpha="",
        rank="",
        place="",
        why="what the whole network gives, fed with the float model's inputs",
    )


def _cell(whole: LayerPlan, one: Bin, place: int, quality: LayerQuality | None, limit: float, folded: str) -> Cell:
    layer = whole.in_bin(place)
    span, clip = _range(layer, place)
    return Cell(
        layer=layer.name,
        bin=one.name,
        when=when(one),
        **_measured(quality, limit, layer.quantized),
        numbers=_numbers(layer),
        range=span,
        clip=clip,
        alpha=f"{layer.smoothing.alpha:g}" if layer.smoothing else "none",
        rank=f"{layer.low_rank.rank} (error {layer.low_rank.error:.3g})" if layer.low_rank else "none",
        place=folded,
        why=_why(layer),
    )


class _Measured(TypedDict):
    sqnr_db: float | None
    state: str
    sqnr: str
    worst: str


def _measured(quality: LayerQuality | None, limit: float, quantized: bool) -> _Measured:
    if quality is None:
        state = "open" if quantized else "float"
        return {"sqnr_db": None, "state": state, "sqnr": "not measured" if quantized else "float", "worst": ""}
    db = quality.sqnr_db
    text = "no difference" if db >= LIMIT_DB else f"{db:.1f} dB"
    worst = f"worst at t={quality.worst_step:g}"
    return {"sqnr_db": db, "state": "low" if db < limit else "ok", "sqnr": text, "worst": worst}


def span(one: Bin) -> str:
    """What a bin serves in few letters, for the head of a column: "873–1000\\ncond"."""
    digits = ".0f" if one.t[1] - one.t[0] >= 5 else ".3g"
    rest = " ".join(filter(None, (one.expert, one.branch if one.branch != "any" else "")))
    return "\n".join(filter(None, (f"{one.t[0]:{digits}}–{one.t[1]:{digits}}", rest)))


def when(one: Bin) -> str:
    """The timesteps and calls of a bin, in words."""
    extra = [one.branch if one.branch != "any" else "", one.expert]
    return ", ".join(
        [
            f"t {one.t[0]:g} … {one.t[1]:g}",
            f"{len(one.steps)} step{'' if len(one.steps) == 1 else 's'}",
            *filter(None, extra),
        ]
    )


def _numbers(layer: LayerPlan) -> str:
    """Types of weight and activation."""
    if not layer.quantized or layer.weight is None:
        return "float"
    weight = f"W{layer.weight.bits} {layer.weight.grid if layer.weight.grid != 'int' else layer.weight.dtype}"
    grouped = f", groups of {layer.weight.group}" if layer.weight.group else ", a scale a channel"
    if layer.activation_dtype == "float":
        return f"{weight}{grouped}; activation float"
    return f"{weight}{grouped}; A{layer.activation_bits} {layer.activation_dtype}"


def _range(layer: LayerPlan, place: int) -> tuple[str, str]:
    """(range of the activation in this bin, how it was chosen)"""
    if layer.activation:
        one = layer.activation[place]
        return f"{one.lo:.4g} … {one.hi:.4g}, scale {one.scale:.4g}, zero point {one.zero_point}", one.why
    if layer.dynamic:
        found = layer.dynamic[place]
        return f"at run time, per {found.kind}, {found.ratio:.0%} of the extremes", found.why
    return "none", ""


def _why(layer: LayerPlan) -> str:
    if layer.keep_float:
        return f"kept in float: {layer.keep_float}"
    hoisted = f"in the {layer.hoisted} graph, ahead of the steps" if layer.hoisted else ""
    weight = f"weight: {layer.weight.why}" if layer.weight else ""
    smoothing = f"smoothing: {layer.smoothing_why}" if layer.smoothing_why else ""
    rotation = f"rotation: {layer.rotation_why}" if layer.rotation_why else ""
    rank = f"branch: {layer.low_rank.why}" if layer.low_rank else ""
    bits = f"bits: {layer.bits_why}" if layer.bits_why else ""
    return "; ".join(filter(None, (hoisted, weight, smoothing, rotation, rank, bits)))
