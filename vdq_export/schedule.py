"""schedule.json: which graph runs at which denoising step.

A bin holds for timesteps lo <= t < hi of one guidance branch (or of any); the highest bin of a branch also holds at hi.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import msgspec

from vdq_export.errors import ScheduleError
from vdq_export.jsonfile import decode, encode
from vdq_export.plan import Bin, Branch

Uncalibrated = Literal["nearest", "refuse"]
EDGE_TOLERANCE = 1e-6  # relative: t travels as float32 between a sampler and us, the calibrated ends are float64


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class StaticPolicy(_Data, frozen=True, tag_field="kind", tag="static"):
    """The bin of a call depends on its timestep, branch and expert alone."""


Policy = StaticPolicy  # `StaticPolicy | DeltaPolicy | …` when there are more: the `kind` key already tells them apart


class When(_Data, frozen=True):
    """The calls a bin is for: t = (lo, hi); `expert` names one network of a model with several ("": the only one)."""

    t: tuple[float, float]
    branch: Branch = "any"
    expert: str = ""


class ScheduledBin(_Data, frozen=True):
    """One graph of the bundle (`graph`: its path there) and when it runs. `steps`: the calibrated t, descending."""

    graph: str
    when: When
    steps: tuple[float, ...] = ()


class Schedule(_Data, frozen=True, dict=True):
    """All bins. `sampler` is what they were calibrated for; `uncalibrated` says what a timestep outside every bin gets.

    Raises ScheduleError when bins overlap, hold no timestep, or are missing altogether.
    """

    bins: tuple[ScheduledBin, ...]
    sampler: dict[str, Any] = {}
    policy: Policy = StaticPolicy()
    uncalibrated: Uncalibrated = "nearest"
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if not self.bins:
            raise ScheduleError("the schedule has no bins")
        for index, one in enumerate(self.bins):
            lo, hi = one.when.t
            if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
                raise ScheduleError(f"bin {index} holds no timestep: [{lo}, {hi}]")
        for expert in sorted({one.when.expert for one in self.bins}):
            for branch in ("cond", "uncond"):
                self._check_overlap(self._candidates(branch, expert))

    def _check_overlap(self, candidates: Sequence[int]) -> None:
        # Two bins that start together overlap too, even when one is the single point lo == hi.
        ordered = sorted(candidates, key=lambda index: self.bins[index].when.t)
        for left, right in pairwise(ordered):
            (lo, hi), (start, _) = self.bins[left].when.t, self.bins[right].when.t
            if start < hi or start == lo:
                raise ScheduleError(f"bins {left} and {right} overlap at t = {start}")

    @staticmethod
    def from_bins(
        bins: Sequence[Bin],
        graphs: Sequence[str],
        *,
        sampler: dict[str, Any] | None = None,
        uncalibrated: Uncalibrated = "nearest",
    ) -> Schedule:
        """The schedule of a plan's bins; `graphs[i]` is the bundle path of the graph of bins[i]."""
        if len(bins) != len(graphs):
            raise ScheduleError(f"{len(bins)} bins but {len(graphs)} graphs")
        scheduled = tuple(
            ScheduledBin(graph=graph, when=When(t=one.t, branch=one.branch, expert=one.expert), steps=one.steps)
            for one, graph in zip(bins, graphs, strict=True)
        )
        return Schedule(bins=scheduled, sampler=sampler or {}, uncalibrated=uncalibrated)

    def select(self, t: float, branch: Branch = "any", *, expert: str = "") -> int:
        """Index of the bin for one call.

        Outside every bin: the nearest one, with one warning per schedule, or ScheduleError when `uncalibrated` is
        "refuse". Raises ScheduleError for a branch or expert without bins and for a t that is not a finite number.
        """
        if not math.isfinite(t):
            raise ScheduleError(f"timestep {t} is not a finite number")
        candidates = self._candidates(branch, expert)
        if not candidates:
            raise ScheduleError(
                f"no graph for branch {branch!r}" + (f" of expert {expert!r}" if expert else ""),
                hint=f"the schedule has {self._offered()}; name the branch with transformer.cache_context(...)",
            )
        for index in candidates:
            lo, hi = self.bins[index].when.t
            if lo <= t < hi or lo == t == hi:
                return index
        # The end of the highest bin is at distance 0, so it needs no case of its own.
        nearest = min(candidates, key=lambda index: (self._distance(index, t), -self.bins[index].when.t[0]))
        if self._distance(nearest, t) > EDGE_TOLERANCE * max(1.0, abs(t)):
            self._outside(t, branch, nearest)
        return nearest

    def next_bin(self, index: int, branch: Branch = "any", *, expert: str = "") -> int | None:
        """The bin that follows `index` when t falls, for the same kind of call; None after the last."""
        order = self.order(branch, expert=expert)
        place = order.index(index) + 1 if index in order else len(order)
        return order[place] if place < len(order) else None

    def order(self, branch: Branch = "any", *, expert: str = "") -> list[int]:
        """Bins of one kind of call in denoising order: highest t first."""
        return sorted(self._candidates(branch, expert), key=lambda index: self.bins[index].when.t, reverse=True)

    def _candidates(self, branch: str, expert: str) -> list[int]:
        whens = enumerate(one.when for one in self.bins)
        return [i for i, when in whens if when.branch in (branch, "any") and when.expert in (expert, "")]

    def _distance(self, index: int, t: float) -> float:
        lo, hi = self.bins[index].when.t
        return max(lo - t, t - hi, 0.0)

    def _offered(self) -> str:
        kinds = {one.when.branch + (f" ({one.when.expert})" if one.when.expert else "") for one in self.bins}
        return ", ".join(sorted(kinds))

    def _outside(self, t: float, branch: str, nearest: int) -> None:
        lo, hi = self.bins[nearest].when.t
        if self.uncalibrated == "refuse":
            raise ScheduleError(
                f"timestep {t:g} ({branch}) was not calibrated; the nearest bin is [{lo:g}, {hi:g}]",
                hint='use the calibrated sampler, or load with uncalibrated="nearest"',
            )
        if not self.__dict__.get("_warned"):
            self.__dict__["_warned"] = True  # once per schedule: a whole sampler outside the range is one mistake
            warnings.warn(
                f"timestep {t:g} was not calibrated; using the nearest bin [{lo:g}, {hi:g}] (said once)",
                stacklevel=3,
            )

    def to_json(self) -> bytes:
        """Raises BundleError for sampler settings that JSON cannot hold."""
        return encode(self, "schedule.json")

    @staticmethod
    def from_json(data: bytes, origin: str = "schedule.json") -> Schedule:
        """Raises ScheduleError when `data` is not a schedule of this format."""
        return decode(data, Schedule, origin, ScheduleError)
