"""Bins partition the schedule; optimal edges are optimal on their objective and never worse than even ones."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import calib_cases as cases
from vdq_export.calib import bins
from vdq_export.calib.bins import Watched, choose, cost_table, even, objective, optimal_partitions
from vdq_export.calib.ranges import Grid, affine, fake_quantize
from vdq_export.calib.record import CalibrationRecord
from vdq_export.errors import RecipeError

GRID = Grid("uint8", 8)


def drifting(steps: int = 8, seed: int = 0, branches: tuple[str, ...] = ("cond",)) -> CalibrationRecord:
    """Two values whose size changes abruptly, at different steps."""
    rng = np.random.default_rng(seed)
    shape = (steps * len(branches), 32, 64)
    sizes = np.where(np.arange(shape[0]) < shape[0] // 4, 8.0, 1.0)[:, None, None]
    first = rng.normal(size=shape) * sizes
    second = rng.normal(size=shape) * rng.uniform(0.5, 2, (shape[0], 1, 1))
    made = [cases.value_record(x.astype(np.float32), name) for x, name in ((first, "a"), (second, "b"))]
    return cases.record(made, branches)


def watch(record: CalibrationRecord) -> list[Watched]:
    return [Watched(v, GRID) for v in record.values.values()]


def table(record: CalibrationRecord) -> np.ndarray[Any, Any]:
    return cost_table(record.steps, record.slots, range(len(record.slots)), watch(record))


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
def test_cost_equals_brute_force(branches: tuple[str, ...]) -> None:
    """5 %: the error is read off a curve of a dozen points, each measured on 2048 values a slot (2 % noise each)."""
    record = drifting(6, branches=branches)
    cost, size = table(record), len(record.steps)
    per_step = len(branches)
    for i in range(size):
        for j in range(i, size):
            expected = 0.0
            for value in record.values.values():
                inside = slice(i * per_step, (j + 1) * per_step)
                scale, zero = affine(float(value.lo[inside].min()), float(value.hi[inside].max()), GRID)
                rows = value.linear()[1]
                error = np.square(rows[inside] - fake_quantize(rows[inside], scale, zero, GRID)).mean(axis=(1, 2))
                expected += (error / np.square(rows[inside]).mean(axis=(1, 2))).sum()
            assert cost[i, j] == pytest.approx(expected, rel=0.05), (i, j)
    assert np.isinf(cost[np.tril_indices(size, -1)]).all()


@pytest.mark.parametrize("kind", ["smoothed", "rotated"])
def test_cost_is_that_of_what_the_transform_leaves(kind: str) -> None:
    """A record of the transformed rows, all of them sampled, costs the same; the bare record does not."""
    record = drifting(5)
    scale = np.geomspace(0.05, 20, 64).astype(np.float32)
    transform = cases.smoothed(scale) if kind == "smoothed" else cases.rotated(64)
    left = cases.record([cases.value_record(transform(v.linear()[1]), v.name) for v in record.values.values()])
    watched = [Watched(v, GRID, transform) for v in record.values.values()]
    ours = cost_table(record.steps, record.slots, range(5), watched)
    upper = np.triu_indices(5)
    np.testing.assert_allclose(ours[upper], table(left)[upper], rtol=1e-5)  # float32 sums in another order
    assert np.abs(ours[upper] / table(record)[upper] - 1).max() > 0.1, "planted: without the transform"


def test_dynamic_programming_equals_enumeration() -> None:
    cost = np.triu(np.random.default_rng(0).uniform(size=(7, 7)))
    cost[np.tril_indices(7, -1)] = np.inf
    for count, starts in enumerate(optimal_partitions(cost), 1):
        every = [[0, *rest] for rest in combinations(range(1, 7), count - 1)]
        assert len(starts) == count and starts[0] == 0
        assert objective(cost, starts) == min(objective(cost, s) for s in every)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 9), seed=st.integers(0, 50), data=st.data())
def test_optimal_is_never_worse_than_even(steps: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps))
    cost = table(drifting(steps, seed))
    best = optimal_partitions(cost)
    assert objective(cost, best[count - 1]) <= objective(cost, even(steps, count)) * (1 + 1e-12)
    values = [objective(cost, s) for s in best]
    assert all(a >= b * (1 - 0.05) for a, b in pairwise(values)), "more bins never cost much"


def test_optimal_edges_find_the_abrupt_change() -> None:
    record = drifting(8)
    found, why = choose(record, watch(record), 2, optimal=True)
    assert found[0].steps == record.steps[:2]
    assert "even edges" in why
    planted = objective(table(record), [0, 3])  # an edge beside the change must show up as worse
    assert planted > 1.2 * objective(table(record), [0, 2])


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 30), optimal=st.booleans(), per_branch=st.booleans(), data=st.data())
def test_bins_partition_the_schedule(steps: int, optimal: bool, per_branch: bool, data: st.DataObject) -> None:
    tsw = data.draw(st.one_of(st.integers(1, steps), st.sampled_from(["all", "auto"])))
    record = drifting(min(steps, 8) if optimal or tsw == "auto" else steps, branches=("cond", "uncond"))
    tsw = min(tsw, len(record.steps)) if isinstance(tsw, int) else tsw
    found, _ = choose(record, watch(record), tsw, optimal=optimal, per_branch=per_branch)
    assert [b.index for b in found] == list(range(len(found)))
    slots = sorted(s for b in found for s in bins.bin_slots(b, record.slots))
    assert slots == list(range(len(record.slots))), "each slot in exactly one bin"
    for branch in ("cond", "uncond") if per_branch else ("any",):
        own = [b for b in found if b.branch == branch]
        assert own[0].t[1] == record.steps[0] and own[-1].t[0] == record.steps[-1]
        assert all(a.t[0] == b.t[1] for a, b in pairwise(own)), "contiguous"
        for index, one in enumerate(own):
            assert all(one.t[0] <= t < one.t[1] or (index == 0 and t == one.t[1]) for t in one.steps)
        if isinstance(tsw, int):
            assert len(own) == tsw
            if not optimal:
                sizes = {len(b.steps) for b in own}
                assert max(sizes) - min(sizes) <= 1


def test_edges_lie_midway() -> None:
    found = bins.make_bins([1000.0, 900.0, 500.0, 0.0], [0, 2])
    assert [b.t for b in found] == [(700.0, 1000.0), (0.0, 700.0)]


def test_all_and_auto() -> None:
    record = drifting(8)
    every, why = choose(record, watch(record), "all")
    assert len(every) == 8 and "each of 8 steps" in why
    found, why = choose(record, watch(record), "auto")
    assert 2 <= len(found) < 8 and "fewest" in why
    flat = cases.record([cases.value_record(np.tile(np.random.default_rng(0).normal(size=(1, 16, 12)), (8, 1, 1)))])
    assert len(choose(flat, watch(flat), "auto")[0]) == 1, "nothing to gain: one bin"


@pytest.mark.parametrize(
    ("tsw", "message"), [(0, "at least one"), (-3, "at least one"), (9, "more time ranges than the 8")]
)
def test_impossible_numbers(tsw: int, message: str) -> None:
    record = drifting(8)
    for optimal in (False, True):
        with pytest.raises(RecipeError, match=message):
            choose(record, watch(record), tsw, optimal=optimal)


def test_zeros_and_constants_cost_nothing() -> None:
    record = cases.record([cases.value_record(np.zeros((4, 8, 3), np.float32))])
    assert table(record)[0, -1] == 0
    assert len(choose(record, watch(record), 2, optimal=True)[0]) == 2


def test_a_silent_step_changes_nothing_elsewhere() -> None:
    record = drifting(6)
    before = table(record)
    quiet = record.values["a"]
    for array in (quiet.lo, quiet.hi, quiet.rows):
        assert array is not None
        array[5] = 0
    after = table(record)
    np.testing.assert_allclose(after[:5, :5], before[:5, :5], rtol=1e-2)
    assert np.isfinite(after[np.triu_indices(6)]).all() and after[5, 5] < before[5, 5]
