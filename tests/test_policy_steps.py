"""What a clip's steps decide, against the definitions of docs/schedule.md written out plainly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdq_export.errors import ScheduleError
from vdq_export.metrics import relative_change
from vdq_export.plan import Precision
from vdq_export.policy import CachePolicy, PatternPolicy, Probe, StaticPolicy
from vdq_export.runtime import steps
from vdq_export.runtime.steps import Call, Clip, Kind, high_steps
from vdq_export.schedule import Schedule, ScheduledBin, When

Array = np.ndarray[Any, Any]
SHAPE = (1, 2)
COND, UNCOND, ANY = [(branch, SHAPE) for branch in ("cond", "uncond", "any")]
STEPS = 8
T = [1000.0 - 100 * step for step in range(STEPS)]
OUTPUTS = st.lists(st.floats(-4, 4, width=32).map(lambda x: np.array([[x, 1.0]], np.float32)), min_size=2, max_size=8)


def schedule(policy: str, experts: bool = False, coefficients: tuple[float, ...] = ()) -> Schedule:
    """Eight calibrated steps in low and high precision; with experts, of two networks that change at t = 500."""
    ranges = [("early", (500.0, 1000.0)), ("late", (0.0, 500.0))] if experts else [("", (0.0, 1000.0))]
    bins = [
        ScheduledBin(graph=f"{precision}{name}", when=When(t=t, expert=name, precision=precision), steps=tuple(T))
        for precision in ("low", "high")
        for name, t in ranges
    ]
    probes = tuple(Probe(graph="p", expert=name, coefficients=coefficients) for name, _ in ranges)
    made = Schedule(
        bins=tuple(bins), policy=StaticPolicy(precision="low"), reuse=CachePolicy(threshold=0.0, probes=probes)
    )
    return made.with_policy(policy)


class Host:
    """Stands for the transformer: `ran` lists how each step ran, None for one that was reused."""

    def __init__(self, policy: str, **kind: Any) -> None:
        self.ran: list[Precision | None] = []
        self.clip = Clip(schedule(policy, **kind), self.ran.append)

    def call(self, t: float, output: Array, kind: Kind = ANY, probe: Array | None = None, expert: str = "") -> Call:
        """One call whose graph would give `output`."""
        call = self.clip.begin(t, kind, lambda: (expert, output if probe is None else probe))
        self.clip.finish(kind, call, output if call.output is None else call.output)
        return call


def run_clip(host: Host, outputs: Sequence[Array]) -> list[Precision | None]:
    before = len(host.ran)
    for t, output in zip(T, outputs, strict=False):
        host.call(t, output)
    return host.ran[before:]


def change(now: Array, before: Array) -> float:
    return float(np.abs(now - before).sum(dtype=np.float64) / np.abs(before).sum(dtype=np.float64))


def delta_by_definition(delta: float, outputs: Sequence[Array]) -> list[Precision]:
    """e accumulates |O_t - O_t+1| / |O_t+1| since the last reset; e < delta: low, else high and e = 0."""
    e, chosen = 0.0, list[Precision]()
    for step in range(len(outputs)):
        if step >= 2:
            e += change(outputs[step - 1], outputs[step - 2])  # what is known before this step runs
        if e < delta:
            chosen.append("low")
        else:
            chosen.append("high")
            e = 0.0
    return chosen


def cache_by_definition(threshold: float, values: Sequence[Array], polynomial: Callable[[float], float]) -> list[bool]:
    """Which steps are reused: estimated change since the last one that ran below the threshold; never first or last."""
    total, reused = 0.0, [False]
    for step in range(1, len(values)):
        total += max(0.0, polynomial(change(values[step], values[step - 1])))
        reused.append(total < threshold and step < STEPS - 1)
        if not reused[-1]:
            total = 0.0
    return reused


# -- bit switching ---------------------------------------------------------------------------------------------------


@given(OUTPUTS, st.floats(0, 3))
def test_delta_follows_its_definition(outputs: list[Array], delta: float) -> None:
    assert run_clip(Host(f"delta={delta!r}"), outputs) == delta_by_definition(delta, outputs)


@given(OUTPUTS)
def test_delta_at_its_ends(outputs: list[Array]) -> None:
    assert set(run_clip(Host("delta=0"), outputs)) == {"high"}
    assert set(run_clip(Host("delta=inf"), [*outputs, np.full(SHAPE, np.nan, np.float32)])) == {"low"}


GROWING = [np.array([[2.0**step, 0.0]], np.float32) for step in range(STEPS)]  # each step changes by 1 exactly


def test_the_accumulator_is_reset_by_a_high_step_and_the_first_two_steps_know_nothing() -> None:
    assert run_clip(Host("delta=1.5"), GROWING) == ["low", "low", "low", "high", "low", "high", "low", "high"]
    assert run_clip(Host("delta=1"), GROWING) == ["low", "low", *["high"] * 6]  # e < delta, not e <= delta
    assert run_clip(Host("delta=1.5,start=high"), GROWING)[:4] == ["high", "low", "low", "high"]


def test_the_last_step_can_be_kept_high() -> None:
    assert run_clip(Host("delta=inf,end=high"), GROWING) == [*["low"] * 7, "high"]
    assert run_clip(Host("delta=inf,end=high,steps=3"), GROWING[:3]) == ["low", "low", "high"]
    host = Host("delta=inf,end=high,start=high")  # another sampler, whose last step is the calibrated one
    for t in (1000.0, 650.0, T[-1]):
        host.call(t, GROWING[0])
    assert host.ran == ["high", "low", "high"]


def test_a_new_clip_begins_from_nothing() -> None:
    host = Host("delta=1.5")
    assert run_clip(host, GROWING) == run_clip(host, GROWING)
    run_clip(host, GROWING[:3])
    host.clip.reset()  # given up at its third step: the next one begins there
    assert [host.call(t, output).precision for t, output in zip(T[2:], GROWING, strict=False)][:3] == ["low"] * 3
    host.clip.reset()
    host.call(T[0], GROWING[0])
    assert host.call(T[0] + 1, GROWING[3]).precision == "low"  # a timestep that rises needs no reset()


class _NoReset(steps._Delta):
    def choose(self, step: int, t: float) -> Precision:
        before = self.changed
        chosen = super().choose(step, t)
        self.changed = before
        return chosen


class _WrongStep(steps._Delta):
    """Compares with the first output, not with the last one's."""

    def observe(self, output: Array) -> None:
        first = self._before
        super().observe(output)
        self._before = output if first is None else first


class _WrongNorm(steps._Delta):
    """Relative to this step's output instead of the last one's."""

    def observe(self, output: Array) -> None:
        if self._before is not None:
            self.changed += relative_change(self._before, output)
        self._before = output


class _Forgetful(steps._Delta):
    """Counts the last change alone."""

    def observe(self, output: Array) -> None:
        self.changed = 0.0
        super().observe(output)


@pytest.mark.parametrize("planted", [_NoReset, _WrongStep, _WrongNorm, _Forgetful])
def test_planted_mistakes_are_caught(planted: type[steps._Delta], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_clip(Host("delta=1.5"), GROWING) == delta_by_definition(1.5, GROWING)
    monkeypatch.setattr(steps, "_Delta", planted)
    assert run_clip(Host("delta=1.5"), GROWING) != delta_by_definition(1.5, GROWING)


def test_a_clip_that_is_not_reset_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of two clips above has teeth."""
    host = Host("delta=1.5")
    first = run_clip(host, GROWING[:4])
    monkeypatch.setattr(host.clip, "reset", lambda: None)
    assert run_clip(host, GROWING[:4]) != first


def test_guidance_branches_share_the_first_calls_decision() -> None:
    """The second branch neither decides nor is it compared, whatever it gives; batches are one output."""
    alone, guided, unnamed = Host("delta=1.5"), Host("delta=1.5"), Host("delta=1.5")
    noise = np.random.default_rng(0).standard_normal((STEPS, *SHAPE)).astype(np.float32)
    for t, output, other in zip(T, GROWING, noise, strict=True):
        expected = alone.call(t, output).precision
        assert guided.call(t, output, COND).precision == guided.call(t, other, UNCOND).precision == expected
        assert unnamed.call(t, output).precision == unnamed.call(t, other).precision == expected
    assert alone.ran == guided.ran == unnamed.ran


def test_an_output_of_another_shape_counts_as_infinite_change() -> None:
    """Guidance in one batch that ends on the way: nothing is known about that step."""
    host = Host("delta=5")
    sizes = [2, 2, 1, 1, 1]
    kinds: list[Kind] = [("any", (size, 2)) for size in sizes]
    outputs = [np.ones((size, 2), np.float32) for size in sizes]
    for t, output, kind in zip(T, outputs, kinds, strict=False):
        host.call(t, output, kind)
    assert host.ran == ["low", "low", "low", "high", "low"]
    assert relative_change(np.zeros(2), np.zeros(2)) == 0 and relative_change(np.ones(2), np.zeros(2)) == math.inf


def test_what_the_caller_does_to_an_output_does_not_matter() -> None:
    host, outputs = Host("delta=1.5"), [output.copy() for output in GROWING]
    for t, output in zip(T, outputs, strict=True):
        host.call(t, output)
        output[:] = 1e9
    assert host.ran == delta_by_definition(1.5, GROWING)


def test_a_call_that_fails_is_made_again() -> None:
    host = Host("delta=1.5")
    for t, output in zip(T, GROWING, strict=True):
        host.clip.begin(t, ANY, lambda: ("", np.ones(1)))  # and then the graph fails: no finish()
        host.call(t, output)
    assert host.ran == delta_by_definition(1.5, GROWING)


# -- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("pattern=stp", "LLLLHHHH"),
        ("pattern=itp", "HHHHLLLL"),
        ("pattern=abs", "LHLHLHLH"),
        ("pattern=stp,share=0.25", "LLLLLLHH"),
        ("pattern=itp,share=0.375", "HHHLLLLL"),
        ("pattern=abs,share=0.25", "LLLHLLLH"),
        ("pattern=abs,share=0.75", "LHHHLHHH"),
        ("pattern=abs,share=1", "HHHHHHHH"),
        ("pattern=sba,share=0", "LLLLLLLL"),
        ("pattern=stp,steps=4", "LLHH"),
    ],
)
def test_patterns(policy: str, expected: str) -> None:
    ran = run_clip(Host(policy), GROWING[: len(expected)])
    assert ran == [{"L": "low", "H": "high"}[letter] for letter in expected]


@given(st.sampled_from(["stp", "itp", "abs", "sba"]), st.integers(1, 60), st.data(), st.integers(0, 9))
def test_every_pattern_spends_the_same_bits(pattern: Any, count: int, data: st.DataObject, seed: int) -> None:
    high = data.draw(st.integers(0, count))
    made = high_steps(PatternPolicy(pattern=pattern, share=high / count, seed=seed), count)
    assert (len(made), sum(made)) == (count, high)


def test_random_patterns_repeat_with_their_seed_only() -> None:
    drawn = {seed: tuple(high_steps(PatternPolicy(pattern="sba", seed=seed), 20)) for seed in range(6)}
    assert len(set(drawn.values())) == 6
    host = Host("pattern=sba,seed=3")
    assert run_clip(host, GROWING) == run_clip(host, GROWING) == run_clip(Host("pattern=sba,seed=3"), GROWING)


def test_a_pattern_ends() -> None:
    host = Host("pattern=abs,steps=2")
    run_clip(host, GROWING[:2])
    with pytest.raises(ScheduleError, match="made for 2 steps"):
        host.call(T[2], GROWING[2])


# -- reuse -----------------------------------------------------------------------------------------------------------


@given(OUTPUTS, st.floats(0, 3), st.sampled_from([(), (0.5, 0.0), (1.0, -0.5, 0.1)]))
def test_reuse_follows_its_definition(values: list[Array], threshold: float, coefficients: tuple[float, ...]) -> None:
    host = Host(f"cache={threshold!r}", coefficients=coefficients)
    expected = cache_by_definition(threshold, values, lambda x: float(np.polyval(coefficients or (1.0, 0.0), x)))
    assert [one is None for one in run_clip(host, values)] == expected


def test_the_last_step_always_runs() -> None:
    still = [np.ones(SHAPE, np.float32)] * STEPS
    assert run_clip(Host("cache=0.1"), still) == ["low", *[None] * 6, "low"]
    assert run_clip(Host("cache=0.1,steps=4"), still[:4]) == ["low", None, None, "low"]
    host = Host("cache=0.1")  # another sampler, whose last step is the calibrated one
    for t in (1000.0, 650.0, T[-1]):
        host.call(t, still[0])
    assert host.ran == ["low", None, "low"]


def test_a_reused_step_gives_the_very_output_of_each_of_its_calls() -> None:
    host, random = Host("cache=9"), np.random.default_rng(0)
    still, first = np.ones(SHAPE), [random.standard_normal(SHAPE).astype(np.float32) for _ in range(2)]
    for kind, output in zip((COND, UNCOND), first, strict=True):
        host.call(T[0], output, kind, still)
    for t in T[1:3]:
        for kind, output in zip((COND, UNCOND), first, strict=True):
            call = host.call(t, random.standard_normal(SHAPE), kind, still)
            assert call.output is not None
            np.testing.assert_array_equal(call.output, output)
            call.output[:] = 0  # the caller's own copy
    assert host.ran == ["low", None, None]


def test_no_call_gets_another_kinds_output() -> None:
    still = np.ones(SHAPE)
    host = Host("cache=9")
    host.call(T[0], still, COND)
    host.call(T[0], still, UNCOND)
    assert host.call(T[1], still, UNCOND).output is None  # the other order: places do not match
    host = Host("cache=9")
    host.call(T[0], still, ANY)
    assert host.call(T[1], still, ("any", (2, 2)), still).output is None
    host = Host("cache=9")
    host.call(T[0], still, COND)
    assert host.call(T[1], still, COND).output is not None
    assert host.call(T[1], still, UNCOND).output is None  # guidance that sets in later


def test_clips_that_cannot_be_told_apart_are_not_reused() -> None:
    """Begun anew at the same timestep, or several clips step by step: a branch comes twice."""
    still, host = np.ones(SHAPE), Host("cache=9")
    for kind in (COND, UNCOND, COND, UNCOND):
        host.call(T[0], still, kind)
    for t in T[1:4]:
        assert host.call(t, still, COND).output is None
    assert host.call(T[0], still, COND).output is None
    assert host.call(T[1], still, COND).output is not None  # the next clip is fine again
    crowd = Host("cache=9")
    for _ in range(steps.MOST_CALLS + 1):
        crowd.call(T[0], still)
    assert crowd.call(T[1], still).output is None


def test_each_expert_runs_its_first_step() -> None:
    host, still = Host("cache=9", experts=True), np.ones(SHAPE)
    for t in T[:7]:
        host.call(t, still, expert="early" if t >= 500 else "late")
    assert [one is None for one in host.ran] == [False, True, True, True, True, True, False]


def test_a_change_that_is_no_number_runs_the_step() -> None:
    host = Host("cache=inf", coefficients=(-1.0, 0.0))
    for t, value in zip(T, (1.0, 1.0, np.nan, 1.0, 1.0, np.inf), strict=False):
        host.call(t, np.ones(SHAPE), probe=np.full(SHAPE, value))
    assert [one is None for one in host.ran] == [False, True, False, False, True, False]


def test_without_a_threshold_no_probe_is_run() -> None:
    host = Host("delta=1+cache=0")
    for t in T:
        host.clip.begin(t, ANY, lambda: pytest.fail("the probe ran"))


# -- together --------------------------------------------------------------------------------------------------------


@given(OUTPUTS, st.floats(0, 3), st.floats(0, 3))
def test_bits_and_reuse_together(values: list[Array], delta: float, threshold: float) -> None:
    """A reused step changes nothing, so bit switching sees the steps that ran alone."""
    host = Host(f"delta={delta!r}+cache={threshold!r}")
    reused = cache_by_definition(threshold, values, float)
    ran = [value for value, skipped in zip(values, reused, strict=True) if not skipped]
    chosen = iter(delta_by_definition(delta, ran))
    assert run_clip(host, values) == [None if skipped else next(chosen) for skipped in reused]


def test_a_failing_probe_changes_nothing() -> None:
    def fail() -> tuple[str, Array]:
        raise OSError

    host, still = Host("delta=0.5+cache=9"), np.ones(SHAPE)
    host.call(T[0], still)
    with pytest.raises(OSError):
        host.clip.begin(T[1], ANY, fail)
    assert host.call(T[1], still).output is not None
