"""The tables of the report page, as rows of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import msgspec

from vdq_export.metrics import LIMIT_DB
from vdq_export.report.cells import OUTPUT
from vdq_export.report.content import Content
from vdq_export.report.data import LayerQuality, VerifyReport
from vdq_export.report.hoisting import HoistingReport

MOVED = 12  # layers shown of those whose SQNR differs most between two bundles
SHOWN = 200  # edits of a pass; all of them are in passes.json


@dataclass(frozen=True)
class Check:
    """One threshold: what is asked, what was measured; ok: None where nothing was."""

    name: str
    asked: str
    measured: str
    ok: bool | None


@dataclass(frozen=True)
class Compared:
    """One measure of two bundles, as text."""

    name: str
    this: str
    other: str


@dataclass(frozen=True)
class Moved:
    """One layer in two bundles: mean SQNR over its bins, and the difference, dB."""

    layer: str
    this: float
    other: float

    @property
    def change(self) -> float:
        return self.this - self.other


@dataclass(frozen=True)
class Pass:
    """One pass, runs of the same name and result together."""

    name: str
    applied: int
    details: tuple[str, ...]
    more: int
    skipped: tuple[tuple[str, str], ...]


def checks(content: Content) -> list[Check]:
    """The recipe's thresholds in the order in which people ask for them."""
    wanted, found = content.bundle.plans[0].recipe.verify, content.verify
    psnr = found.psnr_db if found else None
    weakest = _weakest(content)
    kernels = found.integer_kernels if found else None
    share = kernels.executed / kernels.planned if kernels and kernels.planned else None
    rows = [
        Check("clips against float, PSNR", f"≥ {wanted.min_psnr_db:g} dB", _db(psnr), _least(psnr, wanted.min_psnr_db)),
        Check(
            "weakest layer, SQNR",
            f"≥ {wanted.min_layer_sqnr_db:g} dB",
            _named(weakest),
            _least(weakest.sqnr_db if weakest else None, wanted.min_layer_sqnr_db),
        ),
        Check(
            "planned linears on integer kernels",
            f"≥ {wanted.min_integer_coverage:.0%}",
            f"{kernels.executed} of {kernels.planned}" if kernels else "not measured",
            None if kernels is None else share is None or share >= wanted.min_integer_coverage,
        ),
    ]
    return rows + _judged(found, wanted.max_judge_drop)


def _judged(found: VerifyReport | None, allowed: float) -> list[Check]:
    if found is None or found.judge is None:
        return []
    before, after = found.judge.float_, found.judge.quantized
    return [
        Check(
            f"judge: {name}",
            f"falls by ≤ {allowed:g}",
            f"{before[name]:.0%} → {after[name]:.0%}",
            before[name] - after[name] <= allowed + 1e-9,
        )
        for name in before
    ]


def _weakest(content: Content) -> LayerQuality | None:
    measured = _measured(content)
    return min(measured, key=lambda one: one.sqnr_db) if measured else None


def _measured(content: Content) -> list[LayerQuality]:
    """What verify measured; the network's output, which it calls by the name of the value, is called so."""
    layers = {layer.name for plan in content.bundle.plans for layer in plan.layers}
    found = content.verify.layers if content.verify else ()
    return [one if one.layer in layers else msgspec.structs.replace(one, layer=OUTPUT) for one in found]


def _named(found: LayerQuality | None) -> str:
    if found is None:
        return "not measured"
    return f"{_db(found.sqnr_db)}: {found.layer}, bin{found.bin:02d}"


def _least(found: float | None, wanted: float) -> bool | None:
    return None if found is None else found >= wanted


def _db(found: float | None) -> str:
    if found is None:
        return "not measured"
    return "no difference" if found >= LIMIT_DB else f"{found:.1f} dB"


def key_figures(content: Content) -> list[tuple[str, str]]:
    """What somebody who decides asks first, beside the verdict."""
    plans = [plan for plan in content.bundle.plans if plan.precision in ("", "low")]
    layers = [layer for plan in plans for layer in plan.layers]
    quantized = sum(layer.quantized for layer in layers)
    whole = float_bytes(content.hoisting)
    products = max((one.multiply_adds for one in content.graphs if one.what == "bin"), default=0)
    return [
        ("bundle", megabytes(content.bundle.size)),
        ("float weights", megabytes(whole) if whole else "unknown"),
        ("clips, PSNR", _db(content.verify.psnr_db if content.verify else None)),
        ("bins", str(len(content.bundle.schedule.bins))),
        ("layers quantized", f"{quantized} of {len(layers)}"),
        ("a step", f"{giga(products)} multiply-adds"),
    ]


def float_bytes(hoisting: HoistingReport | None) -> int:
    """Of the float weights of all networks; 0 where the bundle does not say."""
    return sum(one.whole.weight_bytes for one in hoisting.networks) if hoisting else 0


def compared(content: Content, other: Content) -> list[Compared]:
    """Measure by measure, this bundle and the other."""
    texts = [_facts(content), _facts(other)]
    names = dict.fromkeys([*texts[0], *texts[1]])
    return [Compared(name, texts[0].get(name, "–"), texts[1].get(name, "–")) for name in names]


def _facts(content: Content) -> dict[str, str]:
    found, bundle = content.verify, content.bundle
    weakest = _weakest(content)
    steps = [one for one in content.graphs if one.what == "bin"]
    facts = {
        "model": bundle.manifest.model.name,
        "target": f"{bundle.manifest.target} ({bundle.manifest.isa})",
        "recipe": bundle.plans[0].recipe.name,
        "verdict": found.verdict if found else "not measured",
        "clips, PSNR": _db(found.psnr_db if found else None),
        "weakest layer": f"{_db(weakest.sqnr_db)}, {weakest.layer}, bin{weakest.bin:02d}"
        if weakest
        else "not measured",
        "integer kernels": f"{found.integer_kernels.executed} of {found.integer_kernels.planned}" if found else "–",
        "bundle": megabytes(bundle.size),
        "bins": str(len(bundle.schedule.bins)),
        "multiply-adds a step": giga(max((one.multiply_adds for one in steps), default=0)),
        "values alive at once": megabytes(max((one.peak_bytes for one in steps), default=0)),
    }
    judged = _judged(found, 1.0)
    return facts | {one.name: one.measured for one in judged}


def moved(content: Content, other: Content) -> list[Moved]:
    """The layers whose SQNR differs most, this bundle's losses first."""
    this, that = _means(_measured(content)), _means(_measured(other))
    found = [Moved(name, this[name], that[name]) for name in this if name in that]
    largest = sorted(found, key=lambda one: -abs(one.change))[:MOVED]
    return sorted(largest, key=lambda one: one.change)


def _means(found: Iterable[LayerQuality]) -> Mapping[str, float]:
    layers: dict[str, list[float]] = {}
    for one in found:
        layers.setdefault(one.layer, []).append(one.sqnr_db)
    return {name: fmean(numbers) for name, numbers in layers.items()}


def passes(content: Content) -> list[Pass]:
    """The passes that did or skipped something, in order."""
    found = []
    for one in content.passes.passes if content.passes else ():
        if one.applied or one.skipped:
            skipped = tuple((skip.where, skip.why) for skip in one.skipped[:SHOWN])
            more = max(0, len(one.details) - SHOWN)
            found.append(Pass(one.name, one.applied, one.details[:SHOWN], more, skipped))
    return found


def in_float(content: Content) -> list[tuple[str, list[str]]]:
    """(reason, layers) of those that were not quantized, the most frequent reason first."""
    reasons: dict[str, dict[str, None]] = {}
    for plan in content.bundle.plans:
        for layer in plan.layers:
            told = [(layer.keep_float, layer.name)]
            told += [(why, f"{layer.name} in {one.name}") for one, why in zip(plan.bins, layer.float_in, strict=False)]
            for why, name in told:
                reasons.setdefault(why, {})[name] = None
        for attention in plan.attentions:
            reasons.setdefault(attention.keep_float, {})[attention.name] = None
    named = [(why, list(names)) for why, names in reasons.items() if why]
    return sorted(named, key=lambda item: -len(item[1]))


def floating(content: Content) -> list[str]:
    """What verify says of planned integer linears that run in float."""
    return [line for line in (content.verify.failures if content.verify else ()) if "run in float" in line]


def megabytes(count: float) -> str:
    """1.23 MB, 45.6 kB …"""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
        size /= 1000
    return ""


def giga(count: float) -> str:
    """Of operations: 381 M, 1.2 G …"""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:g}"
