"""report/passes.json: what every pass of an export did, in order, and each edit it skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from vdq_export.contract import PassReport
from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode, encode

PASSES = "report/passes.json"


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Skipped(_Data, frozen=True):
    """A planned or possible edit that was not made: where (layer or node), and why."""

    where: str
    why: str


class PassRun(_Data, frozen=True):
    """One pass over one graph. details: where each of the `applied` edits landed."""

    name: str
    applied: int
    details: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()


class PassesReport(_Data, frozen=True):
    """The passes in the order in which they ran; of graphs that are alike (the bins of one plan) those of the first."""

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
                    details=tuple(one.details),
                    skipped=tuple(Skipped(where=skip.where, why=skip.why) for skip in one.skipped),
                )
                for one in reports
            )
        )

    def place_of(self, value: str) -> str:
        """Where smoothing and rotation of a graph value went, in the passes' own words; "" where neither edited it."""
        head = f"{value}: "
        told = [
            detail.removeprefix(head)
            for one in self.passes
            if one.name in ("smoothing", "rotation")
            for detail in one.details
            if detail.startswith(head)
        ]
        return "; ".join(dict.fromkeys(told))

    def to_json(self) -> bytes:
        return encode(self, "passes.json")

    @staticmethod
    def from_json(data: bytes, origin: str = PASSES) -> PassesReport:
        """Raises BundleError when `data` is not a report of this format."""
        return decode(data, PassesReport, origin, BundleError)
