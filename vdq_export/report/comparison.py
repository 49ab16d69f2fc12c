"""Two bundles side by side, as rows of texts and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

from vdq_export.metrics import db_text
from vdq_export.report.content import Content
from vdq_export.report.data import LayerQuality
from vdq_export.report.sections import calls, giga, megabytes
from vdq_export.report.verdict import checks, headline, measured, named, weakest

MOVED = 12  # layers shown of those whose SQNR differs most between two bundles


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


def compared(content: Content, other: Content) -> list[Compared]:
    """Measure by measure, this bundle and the other."""
    texts = [_facts(content), _facts(other)]
    names = dict.fromkeys([*texts[0], *texts[1]])
    return [Compared(name, texts[0].get(name, "–"), texts[1].get(name, "–")) for name in names]


def _facts(content: Content) -> dict[str, str]:
    """What was asked stands beside what was found: verdicts by other thresholds are other verdicts."""
    found, bundle = content.verify, content.bundle
    rows = checks(content)
    facts = {
        "model": bundle.manifest.model.name,
        "target": f"{bundle.manifest.target} ({bundle.manifest.isa})",
        "recipe": bundle.plans[0].recipe.name,
        "verdict": headline(content)[1],
        "asked": "; ".join(f"{one.name} {one.asked}" for one in rows if one.state != "none"),
        "clips, PSNR": db_text(found.psnr_db if found else None),
        "weakest layer": named(weakest(content)),
    }
    told = {one.name: one.measured for one in rows[2:]}
    costs = {
        "bundle": megabytes(bundle.size),
        "bins": str(len(bundle.schedule.bins)),
        "multiply-adds a call": giga(max(calls(content), default=0)),
        "values alive at once": megabytes(
            max((one.peak_bytes for one in content.graphs if one.what == "bin"), default=0)
        ),
    }
    return facts | told | costs


def moved(content: Content, other: Content) -> list[Moved]:
    """The layers whose SQNR differs most, this bundle's losses first."""
    this, that = _means(measured(content)), _means(measured(other))
    found = [Moved(name, this[name], that[name]) for name in this if name in that]
    largest = sorted(found, key=lambda one: -abs(one.change))[:MOVED]
    return sorted(largest, key=lambda one: one.change)


def _means(found: Iterable[LayerQuality]) -> Mapping[str, float]:
    layers: dict[str, list[float]] = {}
    for one in found:
        layers.setdefault(one.layer, []).append(one.sqnr_db)
    return {name: fmean(numbers) for name, numbers in layers.items()}
