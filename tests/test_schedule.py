"""Which graph runs at which timestep."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_bundle import bins
from vdq_export.errors import ScheduleError
from vdq_export.plan import Bin
from vdq_export.schedule import Schedule, ScheduledBin, When

EDGES = st.lists(st.floats(0, 1000, allow_subnormal=False), min_size=2, max_size=9, unique=True)


def schedule(made: list[Bin], **settings: str) -> Schedule:
    return Schedule.from_bins(made, [f"graphs/{one.name}.onnx" for one in made], **settings)  # type: ignore[arg-type]


@given(EDGES, st.data())
def test_every_t_of_the_range_has_exactly_one_bin(edges: list[float], data: st.DataObject) -> None:
    made = bins(edges=tuple(sorted(edges, reverse=True)))
    top = max(edges)
    t = data.draw(st.floats(min(edges), top) | st.sampled_from(edges))
    fitting = [one.index for one in made if one.t[0] <= t < one.t[1] or t == one.t[1] == top]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [schedule(made).select(t)] == fitting


@given(EDGES, st.randoms())
def test_the_order_of_the_bins_in_the_file_does_not_matter(edges: list[float], random: object) -> None:
    made = bins(edges=tuple(sorted(edges, reverse=True)))
    shuffled = list(made)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for t in edges:
        assert shuffled[schedule(shuffled).select(t)].index == made[schedule(made).select(t)].index


def test_edges_belong_to_the_bin_above_and_the_top_is_closed() -> None:
    one = schedule(bins())
    assert [one.select(t) for t in (1000.0, 999.9, 750.0, 749.9, 250.0, 0.0)] == [0, 0, 0, 1, 2, 3]


def test_a_single_step_bin_at_the_top_keeps_its_step() -> None:
    one = schedule([Bin(index=0, t=(5.0, 5.0), steps=()), Bin(index=1, t=(0.0, 5.0), steps=())])
    assert (one.select(5.0), one.select(4.9)) == (0, 1)


def test_branches_choose_their_own_bins() -> None:
    one = schedule(bins(("cond", "uncond")))
    assert (one.select(800, "cond"), one.select(800, "uncond"), one.select(10, "uncond")) == (0, 4, 7)
    assert schedule(bins()).select(800, "uncond") == 0
    with pytest.raises(ScheduleError, match=r"no graph for branch 'any'.*cond, uncond.*cache_context"):
        one.select(800)


def test_experts_choose_their_own_bins() -> None:
    made = [Bin(index=0, t=(500, 1000), steps=(), expert="high"), Bin(index=1, t=(0, 500), steps=(), expert="low")]
    assert schedule(made).select(700, expert="high") == 0
    with pytest.raises(ScheduleError, match="expert 'other'"):
        schedule(made).select(700, expert="other")


def test_outside_the_range_warns_once_and_takes_the_nearest() -> None:
    one = schedule(bins())
    with pytest.warns(UserWarning, match=r"timestep 1200 .*\[750, 1000\]"):
        assert one.select(1200) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one.select(-3) == 3


def test_a_gap_between_bins_is_outside_too() -> None:
    one = schedule([Bin(index=0, t=(900, 1000), steps=()), Bin(index=1, t=(0, 100), steps=())])
    with pytest.warns(UserWarning):
        assert one.select(400) == 1
    assert one.select(600) == 0


def test_refuse() -> None:
    one = schedule(bins(), uncalibrated="refuse")
    with pytest.raises(ScheduleError, match=r"1200 .any. was not calibrated"):
        one.select(1200)
    assert one.select(1000.00001) == 0  # float32 noise at the end is not a mistake of the user's


@pytest.mark.parametrize("t", [float("nan"), float("inf")])
def test_t_must_be_a_number(t: float) -> None:
    with pytest.raises(ScheduleError, match="not a finite number"):
        schedule(bins()).select(t)


def test_the_next_bin_follows_falling_t_within_the_branch_and_the_last_begins_again() -> None:
    one = schedule(bins(("cond", "uncond")))
    assert [one.upcoming(i, "cond") for i in range(4)] == [[1], [2], [3], [0]]
    assert [one.upcoming(i, "uncond") for i in range(4, 8)] == [[5], [6], [7], [4]]
    backwards = schedule(bins()[::-1])
    assert [backwards.upcoming(i) for i in (3, 2, 1, 0)] == [[2], [1], [0], [3]]
    assert schedule(bins(edges=(9.0, 0.0))).upcoming(0) == []


def test_overlaps_and_emptiness_are_refused() -> None:
    with pytest.raises(ScheduleError, match="bins 1 and 0 overlap at t = 4"):
        schedule([Bin(index=0, t=(4, 9), steps=()), Bin(index=1, t=(0, 5), steps=())])
    with pytest.raises(ScheduleError, match="overlap"):  # "any" against "cond"
        schedule([Bin(index=0, t=(4, 9), steps=()), Bin(index=1, t=(0, 5), steps=(), branch="cond")])
    with pytest.raises(ScheduleError, match="no bins"):
        Schedule(bins=())
    with pytest.raises(ScheduleError, match="holds no timestep"):
        Schedule(bins=(ScheduledBin(graph="g", when=When(t=(3.0, 2.0))),))


def test_json_round_trip_and_strictness() -> None:
    one = Schedule.from_bins(bins(), ["a", "b", "c", "d"], sampler={"name": "euler", "shift": 3.0})
    data = one.to_json()
    assert Schedule.from_json(data) == one
    assert Schedule.from_json(data).to_json() == data
    assert b'"kind": "static"' in data
    for bad in (
        data[:-20],
        data.replace(b'"kind": "static"', b'"kind": "cache"'),
        data.replace(b'"steps"', b'"stops"'),
    ):
        with pytest.raises(ScheduleError, match=r"schedule\.json"):
            Schedule.from_json(bad)
