"""schedule.json: which graph runs at which denoising step.

A bin holds for timesteps lo <= t < hi of one guidance branch (or of any); the highest bin of a branch also holds at hi.
Bins of two precisions may hold for the same t: `policy` says from step to step which runs, `reuse` whether any does.
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
from vdq_export.plan import Bin, Branch, Precision, QuantPlan
from vdq_export.policy import BOTH, CachePolicy, DeltaPolicy, PatternPolicy, Policy, StaticPolicy, parse

Uncalibrated = Literal["nearest", "refuse"]
EDGE_TOLERANCE = 1e-6  # relative: t travels as float32 between a sampler and us, the calibrated ends are float64


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class When(_Data, frozen=True):
    """The calls a bin is for: t = (lo, hi).

    expert: one network of a model with several ("": the only one); t alone tells experts apart. precision: "" serves
    calls of any.
    """

    t: tuple[float, float]
    branch: Branch = "any"
    expert: str = ""
    precision: Precision = ""


class ScheduledBin(_Data, frozen=True):
    """One graph of the bundle (`graph`: its path there) and when it runs. `steps`: the calibrated t, descending."""

    graph: str
    when: When
    steps: tuple[float, ...] = ()


class Hoisted(_Data, frozen=True):
    """What left the graphs of `bins` because not every step changes it (docs/hoisting.md); "" for parts there are not.

    prompt, step, mixed: graphs of what depends on the prompt, the timestep, both. tables: a safetensors file of the
    outputs of `step`, {value: [rows, …]}, a row for each of `timesteps` (descending). The graphs of the bins take those
    inputs of the model that they still read, and what the parts give, by name.
    """

    bins: tuple[int, ...]
    prompt: str = ""
    step: str = ""
    mixed: str = ""
    tables: str = ""
    timesteps: tuple[float, ...] = ()

    @property
    def graphs(self) -> tuple[str, ...]:
        """Bundle paths, in the order in which they run."""
        return tuple(path for path in (self.prompt, self.step, self.mixed) if path)


class Schedule(_Data, frozen=True, dict=True):
    """All bins. `sampler` is what they were calibrated for; `uncalibrated` says what a timestep outside every bin gets.

    bits: of activations in each precision's graphs, for statistics. reuse: None when the bundle has no probe graph.
    hoisted: one entry a set of weights; () when every graph takes all inputs of the model.
    Raises ScheduleError when bins overlap, hold no timestep, are missing altogether, or are not what `policy` needs.
    """

    bins: tuple[ScheduledBin, ...]
    sampler: dict[str, Any] = {}
    policy: Policy = StaticPolicy()
    reuse: CachePolicy | None = None
    bits: dict[Precision, float] = {}
    hoisted: tuple[Hoisted, ...] = ()
    uncalibrated: Uncalibrated = "nearest"
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if not self.bins:
            raise ScheduleError("the schedule has no bins")
        for index, one in enumerate(self.bins):
            lo, hi = one.when.t
            if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
                raise ScheduleError(f"bin {index} holds no timestep: [{lo}, {hi}]")
        for branch in ("cond", "uncond"):
            for precision in ("", *BOTH):
                self._check_overlap(self._candidates(branch, None, precision))
        self._check_policy()
        served = [index for one in self.hoisted for index in one.bins]
        if len(set(served)) != len(served) or not set(served) <= set(range(len(self.bins))):
            raise ScheduleError(f"hoisted parts serve bins {served} of {len(self.bins)}", hint="each bin has one entry")

    def _check_overlap(self, candidates: Sequence[int]) -> None:
        # Two bins that start together overlap too, even when one is the single point lo == hi.
        ordered = sorted(candidates, key=lambda index: self.bins[index].when.t)
        for left, right in pairwise(ordered):
            (lo, hi), (start, _) = self.bins[left].when.t, self.bins[right].when.t
            if start < hi or start == lo:
                raise ScheduleError(f"bins {left} and {right} overlap at t = {start}")

    def _check_policy(self) -> None:
        offered = {one.when.precision for one in self.bins} - {""}
        wanted = set(self.policy.precisions)
        if offered and wanted == {""}:
            raise ScheduleError(
                f"the bundle has graphs in {' and '.join(sorted(offered))} precision", hint="choose with static:low …"
            )
        if missing := sorted(wanted - offered - {""}):
            raise ScheduleError(
                f"the bundle has no graphs in {' and '.join(missing)} precision",
                hint="export it with `schedule.delta` in the recipe to have two",
            )
        counting: list[PatternPolicy | DeltaPolicy | CachePolicy] = []
        if isinstance(self.policy, PatternPolicy) or (
            isinstance(self.policy, DeltaPolicy) and self.policy.end == "high"
        ):
            counting.append(self.policy)
        if self.reuse and self.reuse.threshold:
            counting.append(self.reuse)
            for expert in sorted({one.when.expert for one in self.bins}):
                self.reuse.probe(expert)
        if not self.steps and any(not one.steps for one in counting):
            raise ScheduleError("the bins name no calibrated steps to count on", hint="add steps=… to the policy")

    @staticmethod
    def from_bins(
        bins: Sequence[Bin],
        graphs: Sequence[str],
        *,
        precisions: Sequence[Precision] = (),
        **settings: Any,
    ) -> Schedule:
        """The schedule of a plan's bins; `graphs[i]` is the bundle path of the graph of bins[i].

        precisions: of each bin; () for bundles of one. settings: Schedule's other fields.
        """
        precisions = precisions or [""] * len(bins)
        if len(bins) != len(graphs):
            raise ScheduleError(f"{len(bins)} bins but {len(graphs)} graphs")
        scheduled = tuple(
            ScheduledBin(
                graph=graph,
                when=When(t=one.t, branch=one.branch, expert=one.expert, precision=precision),
                steps=one.steps,
            )
            for one, graph, precision in zip(bins, graphs, precisions, strict=True)
        )
        return Schedule(bins=scheduled, **settings)

    @staticmethod
    def from_plans(plans: Sequence[QuantPlan], graphs: Sequence[str], **settings: Any) -> Schedule:
        """The schedule of a bundle's plans; `graphs`: bundle paths in the order of the plans' bins, plan after plan.

        Policy and bits are what the plans' recipes say; settings: Schedule's other fields.
        """
        bins = [(one, plan.precision) for plan in plans for one in plan.bins]
        wanted = next((plan.recipe.schedule for plan in plans if plan.precision), None)
        policy: Policy = StaticPolicy()
        if wanted is not None and wanted.delta is not None:
            policy = DeltaPolicy(delta=wanted.delta, end=wanted.end)
        bits = {precision: _mean_bits([p for p in plans if p.precision == precision]) for _, precision in bins}
        precisions = [precision for _, precision in bins]
        return Schedule.from_bins(
            [one for one, _ in bins],
            graphs,
            precisions=precisions,
            **{"policy": policy, "bits": {p: b for p, b in bits.items() if b}, **settings},
        )

    def with_policy(self, text: str) -> Schedule:
        """The schedule under a policy in words (see policy.parse); what `text` leaves out stays as it is.

        Raises UnknownNameError or ScheduleError for words that make no policy, or none that the bundle can follow.
        """
        policy, cache = parse(text)
        changed: dict[str, Any] = {} if policy is None else {"policy": policy}
        if cache is not None:
            probes = self.reuse.probes if self.reuse else ()
            changed["reuse"] = msgspec.structs.replace(cache, probes=probes)
        return msgspec.structs.replace(self, **changed)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Bundle paths of all graphs that may be run, each once."""
        probes = self.reuse.probes if self.reuse else ()
        ahead = [path for one in self.hoisted for path in one.graphs]
        return tuple(dict.fromkeys([*(one.graph for one in self.bins), *(one.graph for one in probes), *ahead]))

    def ahead(self, index: int) -> Hoisted | None:
        """What left the graph of bin `index`; None when nothing did."""
        return next((one for one in self.hoisted if index in one.bins), None)

    @property
    def steps(self) -> tuple[float, ...]:
        """The calibrated timesteps, descending."""
        return tuple(sorted({t for one in self.bins for t in one.steps}, reverse=True))

    @property
    def stateless(self) -> bool:
        """Whether a call depends on itself alone, not on the steps before it."""
        return isinstance(self.policy, StaticPolicy) and not (self.reuse and self.reuse.threshold)

    def select(self, t: float, branch: Branch = "any", *, expert: str | None = None, precision: Precision = "") -> int:
        """Index of the bin for one call. expert: None for whichever t belongs to.

        Outside every bin: the nearest one, with one warning per schedule, or ScheduleError when `uncalibrated` is
        "refuse". Raises ScheduleError for a call that no bin is for and for a t that is not a finite number.
        """
        if not math.isfinite(t):
            raise ScheduleError(f"timestep {t} is not a finite number")
        candidates = self._candidates(branch, expert, precision)
        if not candidates:
            kind = f"branch {branch!r}" + (f" of expert {expert!r}" if expert else "")
            raise ScheduleError(
                f"no graph for {kind}" + (f" in {precision} precision" if precision else ""),
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

    def upcoming(self, index: int, branch: Branch = "any") -> list[int]:
        """Bins that calls after one of bin `index` may need soon, in every precision that the policy uses.

        These are the ones at the same t and the next ones as t falls; after the last the first, for the next clip.
        """
        here, found = self.bins[index].when.t, list[int]()
        for precision in self.policy.precisions:
            order = self.order(branch, precision=precision)
            before = [one for one in order if self.bins[one].when.t >= here]
            found += [*before[-1:], *(order[len(before) :] or order)[:1]]
        return [one for one in dict.fromkeys(found) if one != index]

    def order(self, branch: Branch = "any", *, expert: str | None = None, precision: Precision = "") -> list[int]:
        """Bins of one kind of call in denoising order: highest t first."""
        found = self._candidates(branch, expert, precision)
        return sorted(found, key=lambda index: self.bins[index].when.t, reverse=True)

    def _candidates(self, branch: str, expert: str | None, precision: str) -> list[int]:
        return [
            index
            for index, when in enumerate(one.when for one in self.bins)
            if when.branch in (branch, "any")
            and (expert is None or when.expert in (expert, ""))
            and when.precision in (precision, "")
        ]

    def _distance(self, index: int, t: float) -> float:
        lo, hi = self.bins[index].when.t
        return max(lo - t, t - hi, 0.0)

    def _offered(self) -> str:
        parts = [(one.when.branch, one.when.expert, one.when.precision) for one in self.bins]
        return ", ".join(sorted({" ".join(word for word in part if word) for part in parts}))

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


def _mean_bits(plans: Sequence[QuantPlan]) -> float:
    """Activation bits of the quantized layers, weighted by their multiplications; 0 when there are none."""
    layers = [layer for plan in plans for layer in plan.of_bins().layers if layer.quantized]
    work = [layer.rows * layer.shape[0] * layer.shape[1] for layer in layers]
    return sum(w * layer.activation_bits for w, layer in zip(work, layers, strict=True)) / sum(work) if layers else 0.0
