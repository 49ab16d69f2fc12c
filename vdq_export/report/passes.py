"""report/passes.json: what every pass of an export did, in order, and each edit it skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from vdq_export.contract import PassReport
from vdq_export.errors import BundleError, StrictError
from vdq_export.jsonfile import decode, encode
from vdq_export.progress import Reporter

PASSES = "report/passes.json"


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Skipped(_Data, frozen=True):
    """A planned or possible edit that was not made: where (layer or node), and why."""

    where: str
    why: str


class PassRun(_Data, frozen=True):
    """One pass over one graph. details: where each of the `applied` edits landed.

    network: which graph: "" the only float graph, an expert's, "bin03": of a bin with weights of its own, or the first
    bin of those to which the pass did the same; "prompt", "low.bin03" … Always "" in bundles of earlier versions.
    """

    name: str
    applied: int
    network: str = ""
    details: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


class PassesReport(_Data, frozen=True):
    """The passes in the order in which they ran; of bins of one plan to which they did the same, those of the first."""

    passes: tuple[PassRun, ...]
    format: Literal[1] = 1

    @staticmethod
    def of(reports: Iterable[PassReport]) -> PassesReport:
        """The reports of an export as plain data."""
        return PassesReport(
            passes=tuple(
                PassRun(
                    name=one.name,
                    applied=one.applied,
                    network=one.network,
                    details=tuple(one.details),
                    skipped=tuple(Skipped(where=skip.where, why=skip.why) for skip in one.skipped),
                )
                for one in reports
            )
        )

    def places(self, network: str) -> dict[str, str]:
        """{graph value: where its smoothing and rotation went, in the passes' own words}, of one set of weights."""
        found: dict[str, dict[str, None]] = {}
        for one in self.passes:
            if one.name in ("smoothing", "rotation") and one.network == network:
                for value, _, place in (detail.partition(": ") for detail in one.details):
                    found.setdefault(value, {})[place] = None
        return {value: "; ".join(places) for value, places in found.items()}

    def to_json(self) -> bytes:
        return encode(self, "passes.json")

    @staticmethod
    def from_json(data: bytes, origin: str = PASSES) -> PassesReport:
        """Raises BundleError when `data` is not a report of this format."""
        return decode(data, PassesReport, origin, BundleError)


def tell(reports: Sequence[PassReport], strict: bool, reporter: Reporter) -> None:
    """Print what each pass did; raises StrictError for a skipped edit with `strict`."""
    for report in reports:
        name = f"{report.network} {report.name}".strip()
        reporter.note(f"{name}: {report.applied} applied, {len(report.skipped)} skipped")
        for skip in report.skipped:
            reporter.note(f"  skipped {skip.where}: {skip.why}")
    skipped = [(r.name, s) for r in reports for s in r.skipped]
    if strict and skipped:
        name, first = skipped[0]
        raise StrictError(f"--strict: {len(skipped)} edits skipped, first by {name} at {first.where}: {first.why}")
