"""The host loop in JavaScript decides as the Python runtime does: bins, what comes next, policies, noise levels."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.host_cases import HOST, needs_node, node
from vdq_export.errors import ScheduleError
from vdq_export.metrics import relative_change
from vdq_export.plan import Bin
from vdq_export.policy import BOTH, CachePolicy, DeltaPolicy, PatternPolicy, Policy, Probe, StaticPolicy
from vdq_export.runtime.steps import Clip
from vdq_export.samples.digits.sampler import DigitsSampler
from vdq_export.schedule import Schedule

pytestmark = needs_node
KIND = ("any", (4,))


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """That many examples, for one Node process to see."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(one: Any) -> None:
        found.append(one)

    collect()
    return found


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Bins between random edges, some left out, in any order; of one or two branches, precisions and experts."""
    edges = sorted(draw(st.lists(st.floats(0, 1000, allow_subnormal=False), min_size=2, max_size=6, unique=True)))
    ranges = [one for one in pairwise(edges) if draw(st.integers(0, 5))] or [(edges[0], edges[-1])]
    if draw(st.booleans()) and ranges[-1][1] == edges[-1]:
        ranges.append((edges[-1], edges[-1]))  # a bin of a single timestep
    branches = draw(st.sampled_from([("any",), ("cond", "uncond"), ("cond",)]))
    precisions = draw(st.sampled_from([("",), BOTH]))
    boundary = draw(st.sampled_from(edges))
    kinds = [(t, branch, precision) for t in ranges for branch in branches for precision in precisions]
    kinds = draw(st.permutations(kinds))
    bins = [
        Bin(index=i, t=t, steps=(t[0],), branch=branch, expert="high" if t[0] >= boundary else "low")
        for i, (t, branch, _) in enumerate(kinds)
    ]
    policy: Policy = StaticPolicy()
    if precisions == BOTH:
        policy = draw(st.sampled_from([DeltaPolicy(delta=0.3), StaticPolicy(precision="low")]))
    return Schedule.from_bins(
        bins,
        [f"graphs/{i}.onnx" for i in range(len(bins))],
        precisions=[precision for *_, precision in kinds],
        policy=policy,
        uncalibrated=draw(st.sampled_from(["nearest", "refuse"])),
    )


@st.composite
def selections(draw: st.DrawFn) -> tuple[Schedule, list[dict[str, Any]]]:
    """A schedule and calls at, beside and between its edges."""
    schedule = draw(schedules())
    ends = [end for one in schedule.bins for end in one.when.t]
    some = st.sampled_from(ends)
    shares = st.sampled_from([-2e-6, -9e-7, 9e-7, 2e-6])
    beside = st.builds(lambda end, share: end + share * max(1.0, end), some, shares)
    times = st.one_of(some, some.map(lambda end: float(np.float32(end))), beside, st.floats(-100, 1100))
    calls = st.fixed_dictionaries(
        {
            "t": times,
            "branch": st.sampled_from(["any", "cond", "uncond"]),
            "precision": st.sampled_from(["", *BOTH]),
        }
    )
    return schedule, draw(st.lists(calls, min_size=1, max_size=8))


vectors = st.lists(st.integers(-16, 16).map(lambda n: n / 8), min_size=4, max_size=4)  # their sums are exact


@st.composite
def clips(draw: st.DrawFn) -> tuple[Schedule, list[dict[str, Any]]]:
    """A policy with or without reuse, and the steps of a clip: what the probe and the network would give."""
    count = draw(st.integers(1, 9))
    calibrated = draw(st.integers(max(1, count - 1), count + 1))
    steps = [float(np.float32(1000 * (1 - i / calibrated))) for i in range(calibrated)]
    high = st.sampled_from(["low", "high"])
    length = st.sampled_from([0, count, count + 1])
    policy = draw(
        st.one_of(
            st.builds(StaticPolicy, precision=st.sampled_from(BOTH)),
            st.builds(
                DeltaPolicy, delta=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0]), start=high, end=high, steps=length
            ),
            st.builds(
                PatternPolicy, pattern=st.sampled_from(["stp", "itp", "abs"]), share=st.floats(0, 1), steps=length
            ),
        )
    )
    coefficients = draw(st.sampled_from([(), (2.0, 0.0), (-1.0, 0.5, 0.125)]))
    cache = CachePolicy(
        threshold=draw(st.sampled_from([0.0, 0.2, 1.0])),
        probes=(Probe(graph="graphs/probe.onnx", coefficients=coefficients),),
        steps=draw(length),
    )
    bins = [Bin(index=i, t=(0.0, 1000.0), steps=tuple(steps)) for i in range(2)]
    schedule = Schedule.from_bins(
        bins, ["a", "b"], precisions=BOTH, policy=policy, reuse=draw(st.sampled_from([None, cache]))
    )
    boundary = draw(st.integers(0, count))
    made = [
        {
            "t": float(np.float32(1000 * (1 - i / max(count, calibrated)))),
            "expert": "high" if i < boundary else "low",
            "modulated": draw(vectors),
            "output": draw(vectors),
        }
        for i in range(count)
    ]
    return schedule, made


def as_json(schedule: Schedule) -> Any:
    return json.loads(schedule.to_json())


def expected_selection(schedule: Schedule, call: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            index = schedule.select(call["t"], call["branch"], precision=call["precision"])
        except ScheduleError:
            return "refused"
    return [index, schedule.upcoming(index, call["branch"])]


def expected_precisions(schedule: Schedule, steps: list[dict[str, Any]]) -> list[str | None]:
    found: list[str | None] = []
    clip = Clip(schedule, lambda precision: found.append(precision))
    for step in steps:
        value = np.array(step["modulated"], np.float32)

        def modulated(expert: str = step["expert"], value: Any = value) -> tuple[str, Any]:
            return expert, value

        try:
            call = clip.begin(step["t"], KIND, modulated)  # type: ignore[arg-type]
        except ScheduleError:
            return [*found, "refused"]
        output = call.output if call.output is not None else np.array(step["output"], np.float32)
        clip.finish(KIND, call, output)  # type: ignore[arg-type]
    return found


def test_it_decides_as_the_python_runtime_does(tmp_path: Path) -> None:
    chosen = examples(selections(), 200)
    followed = examples(clips(), 300)
    samplers = [{"steps": steps, "shift": shift} for steps in (1, 7, 20, 50) for shift in (1.0, 2.0, 5.0)]
    pairs = [(a, b) for a, b in pairwise(step["output"] for _, steps in followed for step in steps)]
    cases = {
        "selections": [{"schedule": as_json(schedule), "calls": calls} for schedule, calls in chosen],
        "clips": [{"schedule": as_json(schedule), "steps": steps} for schedule, steps in followed],
        "samplers": samplers,
        "pairs": pairs,
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = node(HOST / "rules.mjs", tmp_path / "cases.json", tmp_path / "results.json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    selected = [[expected_selection(schedule, call) for call in calls] for schedule, calls in chosen]
    assert results["selections"] == selected
    flat = [one for calls in selected for one in calls]
    assert flat.count("refused") > 50 and len({str(one) for one in flat}) > 20, "the cases say something"

    precisions = [expected_precisions(schedule, steps) for schedule, steps in followed]
    assert results["clips"] == precisions
    steps = [one for found in precisions for one in found]
    assert min(steps.count(kind) for kind in ("low", "high", None)) > 50 and "refused" in steps

    for settings_, levels in zip(samplers, results["levels"], strict=True):
        np.testing.assert_array_equal(levels, DigitsSampler(**settings_).sigmas)  # type: ignore[arg-type]
    changes = [relative_change(np.float32(a), np.float32(b)) for a, b in pairs]
    np.testing.assert_array_equal([np.inf if one is None else one for one in results["changes"]], changes)
