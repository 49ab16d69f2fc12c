"""Carries out a schedule's policy over the steps of one clip: which precision, and whether to run at all.

Formulas are in docs/schedule.md. A *step* is all calls in a row with one timestep (the guidance branches); its first
call decides for the step, and outputs are compared between first calls. A timestep that rises begins a new clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from vdq_export.errors import ScheduleError
from vdq_export.metrics import relative_change
from vdq_export.plan import Branch, Precision
from vdq_export.policy import CachePolicy, DeltaPolicy, PatternPolicy, StaticPolicy
from vdq_export.schedule import EDGE_TOLERANCE, Schedule

Array = np.ndarray[Any, Any]
Kind = tuple[Branch, tuple[int, ...]]  # guidance branch and input shape: outputs are reused within one kind only
MOST_CALLS = 8  # of one step; guidance needs two or three
Modulated = Callable[[], tuple[str, Array]]  # runs the probe: (expert, its modulated input)


class Call(NamedTuple):
    """What to do for a call: run the graph of this precision, or take `output` (a copy) instead of running any."""

    precision: Precision
    output: Array | None = None


class _Precisions(Protocol):
    """How one clip's steps choose precisions; `step` counts them from 0, and t is its timestep."""

    def choose(self, step: int, t: float) -> Precision: ...

    def observe(self, output: Array) -> None:
        """See the output of a step that ran; kept, so it must not be edited afterwards."""
        ...


class Clip:
    """The steps of one clip so far. Not thread-safe: a clip is one thread's sequence of calls.

    count: told once for each step how it ran; None for a step that reuses the one before.
    """

    def __init__(self, schedule: Schedule, count: Callable[[Precision | None], None]) -> None:
        self._schedule = schedule
        self._count = count
        self.reset()

    def reset(self) -> None:
        """Forget the clip: the next call is the first of another."""
        reuse = self._schedule.reuse
        self._precisions = _precisions(self._schedule)
        self._reuse = _Reuse(reuse, self._schedule.steps) if reuse and reuse.threshold else None
        self._t = math.inf
        self._step = -1
        self._precision: Precision | None = None  # of this step, once one of its calls has to run
        self._reused = False
        self._decided = False  # whether a call of this step has been finished
        self._before: list[tuple[Kind, Array]] = []  # what the calls of the step before gave, in their order
        self._now: list[tuple[Kind, Array]] = []

    def begin(self, t: float, kind: Kind, modulated: Modulated) -> Call:
        """Decide about a call at `t`; finish() reports its output.

        Raises ScheduleError when the policy does not reach as far as this step.
        """
        if t > self._t:
            self.reset()
        if t != self._t:
            self._next_step(t, modulated)
        if self._reuse and self._is_foreign(kind):
            self._reuse, self._reused, self._before, self._now = None, False, [], []
        if self._reused and len(self._now) < len(self._before):
            its_kind, output = self._before[len(self._now)]
            if its_kind == kind:
                return Call("", output.copy())
        if self._precision is None:
            self._precision = self._precisions.choose(self._step, t)
        return Call(self._precision)

    def finish(self, kind: Kind, call: Call, output: Array) -> None:
        """Report what the call of begin() gave."""
        first, self._decided = not self._decided, True
        if first:
            self._count(call.precision if call.output is None else None)
        if call.output is not None:
            self._now.append(self._before[len(self._now)])
        elif self._reuse or (first and not self._schedule.stateless):
            own = output.copy()  # the caller owns `output` and may write into it
            if first:
                self._precisions.observe(own)
            if self._reuse:
                self._now.append((kind, own))

    def _next_step(self, t: float, modulated: Modulated) -> None:
        # Decided before anything changes: should the probe fail, the call can be made again.
        reused = self._reuse is not None and self._reuse.decide(self._step + 1, t, modulated)
        self._t, self._step, self._precision, self._reused = t, self._step + 1, None, reused
        self._decided, self._before, self._now = False, self._now, []

    def _is_foreign(self, kind: Kind) -> bool:
        """Whether a call is not of this clip: whose outputs are whose is unknown then, and none is reused any more.

        A branch twice at one t is a clip begun anew, or several at once; so are more calls than guidance ever makes.
        """
        calls = [other for other, _ in self._now]
        return (kind[0] != "any" and kind in calls) or len(calls) >= MOST_CALLS


def high_steps(policy: PatternPolicy, steps: int) -> list[bool]:
    """Which steps of a pattern are high."""
    high = round(policy.share * steps)
    if policy.pattern == "stp":
        return [step >= steps - high for step in range(steps)]
    if policy.pattern == "itp":
        return [step < high for step in range(steps)]
    if policy.pattern == "abs":
        return [(step + 1) * high // steps > step * high // steps for step in range(steps)]
    drawn = set(np.random.default_rng(policy.seed).permutation(steps)[:high].tolist())
    return [step in drawn for step in range(steps)]


def is_last(step: int, t: float, steps: int, calibrated: Sequence[float]) -> bool:
    """Whether a clip of `steps` steps ends here; 0: a clip of the calibrated timesteps (descending), by number or t."""
    if steps:
        return step >= steps - 1
    return step >= len(calibrated) - 1 or t <= calibrated[-1] + EDGE_TOLERANCE * max(1.0, abs(calibrated[-1]))


def _precisions(schedule: Schedule) -> _Precisions:
    if isinstance(schedule.policy, StaticPolicy):
        return _Fixed(schedule.policy.precision)
    if isinstance(schedule.policy, DeltaPolicy):
        return _Delta(schedule.policy, schedule.steps)
    return _Pattern(schedule.policy, schedule.policy.steps or len(schedule.steps))


class _Fixed:
    def __init__(self, precision: Precision) -> None:
        self._precision = precision

    def choose(self, step: int, t: float) -> Precision:
        return self._precision

    def observe(self, output: Array) -> None:
        """Nothing depends on outputs."""


class _Pattern(_Fixed):
    def __init__(self, policy: PatternPolicy, steps: int) -> None:
        self._high = high_steps(policy, steps)

    def choose(self, step: int, t: float) -> Precision:
        if step >= len(self._high):
            raise ScheduleError(
                f"the pattern is made for {len(self._high)} steps, this clip has more",
                hint="say how many in the policy: pattern=…,steps=N",
            )
        return "high" if self._high[step] else "low"


class _Delta:
    """`changed` is e of the definition: the outputs' relative changes since the last high step."""

    def __init__(self, policy: DeltaPolicy, calibrated: tuple[float, ...]) -> None:
        self._policy = policy
        self._calibrated = calibrated
        self.changed = 0.0
        self._before: Array | None = None

    def choose(self, step: int, t: float) -> Precision:
        if step == 0 and self._policy.start == "high":
            return "high"
        if self._policy.end == "high" and is_last(step, t, self._policy.steps, self._calibrated):
            return "high"
        # An infinite threshold holds against infinite change, too.
        if self.changed < self._policy.delta or math.isinf(self._policy.delta):
            return "low"
        self.changed = 0.0
        return "high"

    def observe(self, output: Array) -> None:
        if self._before is not None:
            self.changed += relative_change(output, self._before)
        self._before = output


class _Reuse:
    """Accumulates the estimated change of the output since the last step that ran."""

    def __init__(self, policy: CachePolicy, calibrated: tuple[float, ...]) -> None:
        self._policy = policy
        self._calibrated = calibrated
        self._changed = 0.0
        self._before: tuple[str, Array] | None = None

    def decide(self, step: int, t: float, modulated: Modulated) -> bool:
        """Whether the step may take the output of the one before. Looks at the modulated input of every step."""
        expert, value = modulated()
        before, self._before = self._before, (expert, value)
        if before is not None and before[0] == expert and not is_last(step, t, self._policy.steps, self._calibrated):
            self._changed += self._estimate(expert, relative_change(value, before[1]))
            if self._changed < self._policy.threshold:
                return True
        self._changed = 0.0
        return False

    def _estimate(self, expert: str, change: float) -> float:
        """Change of the output for a change of the modulated input."""
        if not math.isfinite(change):  # a polynomial could make anything of it
            return math.inf
        estimate = float(np.polyval(self._policy.probe(expert).coefficients or (1.0, 0.0), change))
        return 0.0 if estimate < 0 else estimate  # a fitted polynomial can dip below zero, a change cannot
