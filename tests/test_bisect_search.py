"""bisect's search: on errors that are sums, on errors that are not, and on clips of the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import clip_model
from vdq_export.bisect.candidates import Place, candidates, effects
from vdq_export.bisect.search import Sum, search
from vdq_export.bisect.trials import Trials
from vdq_export.compiler import export
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.progress import Reporter

T = TypeVar("T", int, Place)
Members = frozenset[int]


def found(
    prior: Mapping[T, float], error: Callable[[frozenset[T]], float], allowed: float, runs: int = 10_000
) -> tuple[frozenset[T], bool, int]:
    """(members, whether none can be left out, runs); checks what is promised of any error."""
    seen = list[frozenset[T]]()

    def measured(members: frozenset[T]) -> float:
        assert 0 < len(members) < len(prior) and members not in seen, "that was known"
        seen.append(members)
        return error(members)

    start, floor = error(frozenset[T]()), error(frozenset(prior))
    members, minimal = search(prior, measured, start=start, floor=floor, allowed=allowed, runs=runs)
    assert error(members) <= allowed
    assert len(seen) <= runs
    if minimal:
        assert not any(error(members - {one}) <= allowed for one in members)
    return members, minimal, len(seen)


def total(weights: list[int]) -> Callable[[Members], float]:
    return lambda members: float(sum(w for i, w in enumerate(weights) if i not in members))


def fewest(weights: list[int], allowed: float) -> int:
    rest, count = sorted(weights), len(weights)
    while count and sum(rest[: len(weights) - count + 1]) <= allowed:
        count -= 1
    return count


sums = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


@given(sums, st.floats(0.0, 0.99))
def test_no_set_is_smaller_where_the_prior_is_right(weights: list[int], share: float) -> None:
    allowed = share * sum(weights)
    members, minimal, runs = found(dict(enumerate(weights)), total(weights), allowed)
    assert minimal and len(members) == fewest(weights, allowed)
    assert runs <= 2 * len(weights) + 8


@given(sums, st.floats(0.0, 0.99), st.integers(0, 1 << 30))
def test_a_prior_that_is_off_costs_runs(weights: list[int], share: float, seed: int) -> None:
    """Weights known to a factor of e, some as if they were bad: enough all the same, few more, none in vain."""
    noise = np.random.default_rng(seed).normal(size=len(weights))
    prior = {i: w * float(np.exp(noise[i])) * (-1 if noise[i] > 2 else 1) for i, w in enumerate(weights)}
    members, minimal, _ = found(prior, total(weights), share * sum(weights))
    assert minimal
    assert len(members) <= fewest(weights, share * sum(weights)) + 2 + len(weights) // 10


@given(st.integers(2, 12), st.integers(0, 1 << 30), st.floats(0.05, 0.9))
@settings(max_examples=50)
def test_errors_that_interact(count: int, seed: int, share: float) -> None:
    """Of vectors that add up, |sum|² falls and rises with each: the set is enough, and none can be left out."""
    vectors = np.random.default_rng(seed).normal(size=(count, 6))

    def error(members: Members) -> float:
        left = sum((v for i, v in enumerate(vectors) if i not in members), np.zeros(6))
        return float(left @ left)

    prior = {i: error(frozenset()) - error(frozenset([i])) for i in range(count)}
    _, minimal, runs = found(prior, error, share * error(frozenset()))
    assert minimal and runs < 2**count


@given(st.integers(1, 40), st.integers(0, 1 << 30))
def test_errors_of_no_sense_at_all(count: int, seed: int) -> None:
    def error(members: Members) -> float:
        if len(members) in (0, count):
            return float(not members)
        return float(np.random.default_rng([seed, *sorted(members)]).random())

    _, minimal, _ = found(dict.fromkeys(range(count), 1.0), error, 0.4)
    assert minimal


@pytest.mark.parametrize(("count", "bad"), [(1600, {1000}), (1600, {0}), (1600, {1599}), (300, {5, 77, 140})])
def test_few_runs_where_nothing_is_known_beforehand(count: int, bad: set[int]) -> None:
    members, minimal, runs = found(dict.fromkeys(range(count), 1.0), lambda members: float(len(bad - members)), 0.01)
    assert (members, minimal) == (bad, True)
    assert runs <= 60


@pytest.mark.parametrize("runs", [0, 1, 5])
def test_the_best_so_far_when_runs_are_spent(runs: int) -> None:
    weights = [*range(40, 0, -1)]
    members, minimal, spent = found(dict.fromkeys(range(40), 1.0), total(weights), 100.0, runs)
    assert (minimal, spent) == (False, runs)
    assert (len(members) == 40) == (runs == 0)


def test_what_was_measured_counts_more_than_the_prior() -> None:
    believed = Sum({"a": 3.0, "b": 1.0, "c": -1.0})
    assert believed.weights().sum() == pytest.approx(1.0)
    believed.learn(frozenset("a"), 0.9)
    weights = dict(zip(believed.items, believed.weights(), strict=True))
    assert weights["a"] == pytest.approx(0.1, abs=0.02) and weights["b"] > 0.8


# -- clips -----------------------------------------------------------------------------------------------------------


class Clips:
    """The tiny model's clip 0, from a bundle in 8 bits: its error with layers in float, each set measured once."""

    def __init__(self, model: Model, traced: Graph, folder: Path) -> None:
        choices: dict[str, Any] = {"recipe": "static-minmax", "tsw": 2, "out": folder / "out", "workers": 1}
        bundle = export(model, traced={"": traced.copy()}, **choices)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vdq_export.verify.trace", lambda model, tolerance: traced.copy())
            self.candidates, calls = candidates(bundle, model, Reporter())
        self.falls, _ = effects(bundle, self.candidates, calls, Reporter())
        self._trials = Trials(bundle, model, self.candidates, 1, lambda done, total: None)
        self._known: dict[frozenset[Place], float] = {}

    def error(self, places: frozenset[Place]) -> float:
        if places not in self._known:
            self._known[places] = 10 ** (-self._trials(places) / 10)
        return self._known[places]


@pytest.fixture(scope="module")
def clips(traced: Graph, tmp_path_factory: pytest.TempPathFactory) -> Clips:
    return Clips(clip_model.build(), traced, tmp_path_factory.mktemp("clips"))


@pytest.mark.parametrize(("gain", "most", "most_runs"), [(1, 2, 6), (3, 5, 20), (6, 11, 60), (10, 19, 80)])
def test_clips_need_few(clips: Clips, gain: float, most: int, most_runs: int) -> None:
    """Of 40 candidates. What one-by-one measurement of all (40 runs and more) found: 2, 5, 10, 17 (docs/bisect.md)."""
    members, minimal, runs = found(clips.falls, clips.error, clips.error(frozenset()) * 10 ** (-gain / 10))
    assert len(clips.falls) == 40 and minimal
    assert (len(members), runs) <= (most, most_runs)
    assert runs <= most_runs


def test_of_seven_candidates_the_smallest_set(clips: Clips) -> None:
    """Against every set of them, the others being float: for nearly all of 48 errors to reach."""
    some = frozenset(sorted(clips.falls, key=clips.falls.__getitem__)[3::6])
    rest = frozenset(clips.falls) - some
    every = [frozenset(members) for k in range(8) for members in combinations(sorted(some), k)]
    errors = {members: clips.error(members | rest) for members in every}
    low, high = np.log10(errors[some]), np.log10(errors[frozenset()])
    more = []
    for share in np.linspace(0.03, 0.97, 48):
        allowed = float(10 ** (high + share * (max(low, high - 2.5) - high)))
        members, minimal, _ = found({one: clips.falls[one] for one in some}, errors.__getitem__, allowed)
        assert minimal
        more.append(len(members) - min(len(one) for one, error in errors.items() if error <= allowed))
    assert more.count(0) >= 44 and max(more) <= 1
