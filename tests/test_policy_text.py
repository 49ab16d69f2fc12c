"""Policies in words and in schedule.json, and the bins they choose from."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from tests.tiny_bundle import bins
from vdq_export import recipe
from vdq_export.errors import ScheduleError, UnknownNameError
from vdq_export.plan import Bin, LayerPlan, Precision, QuantPlan, Range, WeightPlan
from vdq_export.policy import CachePolicy, DeltaPolicy, PatternPolicy, Probe, StaticPolicy, parse
from vdq_export.schedule import Schedule, ScheduledBin, When

PROBES = (Probe(graph="graphs/probe.onnx", coefficients=(0.5, 0.0)),)


def two(**settings: Any) -> Schedule:
    """Bins 0 … 3 in low precision, 4 … 7 in high."""
    made = [*bins(), *bins()]
    precisions: list[Precision] = ["low"] * 4 + ["high"] * 4  # type: ignore[assignment]
    chosen: dict[str, Any] = {"policy": DeltaPolicy(delta=0.3), **settings}
    return Schedule.from_bins(made, [f"g{index}" for index in range(8)], precisions=precisions, **chosen)


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("static", StaticPolicy()),
        ("static:low", StaticPolicy(precision="low")),
        ("static=high", StaticPolicy(precision="high")),
        ("delta=0.3", DeltaPolicy(delta=0.3)),
        ("delta=1e+2,start=high", DeltaPolicy(delta=100.0, start="high")),
        ("delta=0.1,end=high,steps=30", DeltaPolicy(delta=0.1, end="high", steps=30)),
        ("delta=inf", DeltaPolicy(delta=math.inf)),
        ("pattern=abs", PatternPolicy(pattern="abs")),
        ("pattern:sba,share=0.35,seed=1,steps=40", PatternPolicy(pattern="sba", share=0.35, seed=1, steps=40)),
    ],
)
def test_words_become_policies(text: str, expected: object) -> None:
    assert parse(text) == (expected, None)
    cached = parse(f"{text} + cache=0.1,steps=50")
    assert cached == (expected, CachePolicy(threshold=0.1, steps=50)) == parse(f"cache=0.1,steps=50+{text}")
    assert parse("cache=0") == (None, CachePolicy(threshold=0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dleta=0.3", "unknown policy 'dleta'; did you mean delta"),
        ("0.3", r"unknown policy '0\.3'; known: cache, delta, pattern, static"),
        ("pattern=asb", "unknown pattern 'asb'; did you mean sba or abs"),
        ("static:hihg", "unknown precision 'hihg'; did you mean high"),
        ("delta=0.3,strat=low", "unknown setting of policy delta 'strat'; did you mean start"),
        ("pattern=sba,start=low", "unknown setting of policy pattern 'start'; did you mean"),
        ("static:low,seed=1", "policy 'static' has no settings, got 'seed'"),
        ("delta", r"policy 'delta' needs a value; write delta=0\.3"),
        ("pattern", "policy 'pattern' needs a value; write pattern=abs"),
        ("delta=much", "delta must be a number, got 'much'"),
        ("delta=nan", "delta must be a number, got 'nan'"),
        ("delta=-1", "policy 'delta=-1': delta: needs a number >= 0"),
        ("pattern=abs,share=1.5", "share: needs a number <= 1"),
        ("pattern=sba,seed=1.5", "seed must be a number, got '1.5'; for example seed=20"),
        ("delta=0.3+pattern=abs", "chooses precisions twice"),
        ("cache=1+cache=2", "says cache twice"),
        ("delta=0.3+", "has an empty part"),
        ("", "has an empty part"),
    ],
)
def test_bad_words(text: str, message: str) -> None:
    with pytest.raises((ScheduleError, UnknownNameError), match=message):
        parse(text)


def test_words_change_only_what_they_name() -> None:
    one = two(reuse=CachePolicy(threshold=0.2, probes=PROBES))
    changed = one.with_policy("static:low")
    assert (changed.policy, changed.reuse, changed.bins) == (StaticPolicy(precision="low"), one.reuse, one.bins)
    changed = one.with_policy("cache=0.4")
    assert (changed.policy, changed.reuse) == (one.policy, CachePolicy(threshold=0.4, probes=PROBES))
    off = one.with_policy("cache=0+static:high")
    assert off.stateless and not one.stateless and not changed.stateless


# -- schedule.json ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [StaticPolicy(precision="high"), DeltaPolicy(delta=0.25, start="high"), PatternPolicy(pattern="sba", seed=4)],
)
def test_json_round_trip(policy: Any) -> None:
    one = two(policy=policy, reuse=CachePolicy(threshold=0.1, probes=PROBES), bits={"low": 4.0, "high": 8.0})
    data = one.to_json()
    assert Schedule.from_json(data) == one and Schedule.from_json(data).to_json() == data
    assert f'"kind": "{type(policy).__name__.removesuffix("Policy").lower()}"'.encode() in data
    with pytest.raises(ScheduleError):
        Schedule.from_json(data.replace(b'"policy": {', b'"policy": {"more": 1, '))


def test_numbers_out_of_bounds_in_a_file_are_refused() -> None:
    data = two().to_json()
    for bad in (b'"delta": -0.3', b'"delta": null', b'"delta": "0.3"'):
        with pytest.raises(ScheduleError, match=r"schedule\.json"):
            Schedule.from_json(data.replace(b'"delta": 0.3', bad))


# -- bins of two precisions ------------------------------------------------------------------------------------------


def test_a_call_gets_a_bin_of_its_precision() -> None:
    one = two()
    assert (one.select(800, precision="low"), one.select(800, precision="high")) == (0, 4)
    assert one.order(precision="high") == [4, 5, 6, 7]
    with pytest.raises(ScheduleError, match=r"no graph for branch 'any'.*the schedule has any high, any low"):
        one.select(800)
    with pytest.raises(ScheduleError, match="in low precision"):
        Schedule.from_bins(bins(), list("abcd"), precisions=["high"] * 4, policy=StaticPolicy(precision="high")).select(
            800, precision="low"
        )


def test_a_bin_without_precision_serves_any() -> None:
    """Two experts, of which the first is switched."""
    kinds: list[tuple[tuple[float, float], str]] = [((5, 9), "a"), ((5, 9), "a"), ((0, 5), "b")]
    made = [Bin(index=i, t=t, steps=(t[0],), expert=expert) for i, (t, expert) in enumerate(kinds)]
    one = Schedule.from_bins(made, list("abc"), precisions=["low", "high", ""], policy=DeltaPolicy(delta=1.0))
    assert [one.select(6, precision="low"), one.select(6, precision="high")] == [0, 1]
    assert one.select(2, precision="low") == one.select(2, precision="high") == 2
    assert (one.upcoming(0), one.upcoming(1), one.upcoming(2)) == ([2, 1], [0, 2], [0, 1])


def test_experts_are_told_apart_by_t() -> None:
    made = [Bin(index=0, t=(500, 1000), steps=(), expert="high"), Bin(index=1, t=(0, 500), steps=(), expert="low")]
    one = Schedule.from_bins(made, ["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [one.select(t) for t in (1000, 500, 499, 0)] == [0, 0, 1, 1]
    assert one.order() == [0, 1] and one.upcoming(0) == [1]
    with pytest.raises(ScheduleError, match="bins 0 and 1 overlap at t = 500"):
        Schedule.from_bins([made[0], Bin(index=1, t=(400, 600), steps=(), expert="low")][::-1], ["a", "b"])


def test_bins_overlap_within_a_precision_only() -> None:
    made = [Bin(index=0, t=(4, 9), steps=()), Bin(index=1, t=(0, 5), steps=())]
    both: list[Precision]
    for both in (["low", "low"], ["low", ""], ["", "high"]):
        with pytest.raises(ScheduleError, match="overlap at t = 4"):
            Schedule.from_bins(made, ["a", "b"], precisions=both, policy=StaticPolicy(precision=both[0] or both[1]))
    one = Schedule.from_bins(made, ["a", "b"], precisions=["low", "high"], policy=DeltaPolicy(delta=1.0))
    assert one.select(4.5, precision="low") == 0 and one.select(4.5, precision="high") == 1


def test_what_is_foreseen_when_edges_differ() -> None:
    """Low 900-500-0 (bins 0, 1), high 900-600-300-0 (bins 2, 3, 4): what t may fall to next, in either."""
    edges = {"low": (900, 500, 0), "high": (900, 600, 300, 0)}
    ranges = [(lo, hi, name) for name, all_ in edges.items() for hi, lo in pairwise(all_)]
    made = tuple(
        ScheduledBin(graph="g", when=When(t=(lo, hi), precision=name))  # type: ignore[arg-type]
        for lo, hi, name in ranges
    )
    one = Schedule(bins=made, policy=DeltaPolicy(delta=1.0))
    foreseen = [sorted(one.upcoming(index)) for index in range(5)]
    assert foreseen == [[1, 2, 3], [0, 3, 4], [0, 3], [0, 1, 4], [0, 1, 2]]


def test_policies_need_their_bins() -> None:
    with pytest.raises(ScheduleError, match="no graphs in high and low precision"):
        Schedule.from_bins(bins(), list("abcd"), policy=DeltaPolicy(delta=1.0))
    with pytest.raises(ScheduleError, match="no graphs in high precision"):
        Schedule.from_bins(bins(), list("abcd"), precisions=["low"] * 4, policy=PatternPolicy(pattern="abs"))
    with pytest.raises(ScheduleError, match=r"high and low precision; choose with static:low"):
        two(policy=StaticPolicy())
    bare = [Bin(index=0, t=(0, 9), steps=())] * 2
    with pytest.raises(ScheduleError, match=r"no calibrated steps to count on; add steps="):
        Schedule.from_bins(bare, ["a", "b"], precisions=["low", "high"], policy=PatternPolicy(pattern="abs"))
    one = Schedule.from_bins(bare, ["a", "b"], precisions=["low", "high"], policy=DeltaPolicy(delta=1.0))
    with pytest.raises(ScheduleError, match=r"no calibrated steps"):
        one.with_policy("delta=1,end=high")
    assert one.with_policy("delta=1,end=high,steps=9") != one
    with pytest.raises(ScheduleError, match="no probe graph for expert 'b'"):
        only = (Probe(graph="p", expert="a"),)
        made = [Bin(index=0, t=(5, 9), steps=(6,), expert="a"), Bin(index=1, t=(0, 5), steps=(1,), expert="b")]
        Schedule.from_bins(made, ["a", "b"], reuse=CachePolicy(threshold=0.1, probes=only))


# -- from plans ------------------------------------------------------------------------------------------------------


def plan(precision: Precision, first: int, bits: tuple[int, int], delta: float | None = 0.3) -> QuantPlan:
    """Two bins, two layers: the second has three times the multiplications of the first."""
    settings = recipe.load("static-minmax")
    settings = msgspec.structs.replace(settings, schedule=recipe.ScheduleRecipe(delta=delta))
    weight = WeightPlan(dtype="int8", qmax=127, scale=(1.0,) * 2, why="")
    one = Range(lo=0, hi=1, scale=1.0, zero_point=0, why="")
    layers = tuple(
        LayerPlan(
            name=name, value="v", rows=rows, shape=(4, 2), weight=weight, activation=(one, one), activation_bits=b
        )
        for name, rows, b in (("a", 1, bits[0]), ("b", 3, bits[1]))
    )
    made = tuple(Bin(index=first + i, t=t, steps=(t[0],)) for i, t in enumerate(((5.0, 9.0), (0.0, 5.0))))
    kept = LayerPlan(name="c", value="v", rows=9, shape=(4, 2), keep_float="asked for")
    return QuantPlan(
        model="m", graph_hash="", target="t", recipe=settings, bins=made, layers=(*layers, kept), bins_why="",
        precision=precision,
    )  # fmt: skip


def test_a_schedule_from_plans_takes_policy_and_bits_from_them() -> None:
    graphs = list("abcd")
    one = Schedule.from_plans([plan("low", 0, (4, 4)), plan("high", 2, (4, 8))], graphs, sampler={"steps": 2})
    assert [(b.graph, b.when.precision, b.when.t) for b in one.bins] == [
        ("a", "low", (5.0, 9.0)), ("b", "low", (0.0, 5.0)), ("c", "high", (5.0, 9.0)), ("d", "high", (0.0, 5.0)),
    ]  # fmt: skip
    assert one.policy == DeltaPolicy(delta=0.3) and one.bits == {"low": 4.0, "high": 7.0}
    assert one.sampler == {"steps": 2} and one.steps == (5.0, 0.0)
    single = Schedule.from_plans([plan("", 0, (8, 8), delta=None)], graphs[:2])
    assert single.policy == StaticPolicy() and single.bits == {"": 8.0}
