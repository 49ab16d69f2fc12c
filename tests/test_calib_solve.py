"""The solver on an observed hand-made graph: what lands in the plan, and the numbers against the quantized layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import calib_cases as cases
from tests.planning import plan_of
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.errors import CalibrationError, RecipeError
from vdq_export.graph import Graph
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.recipe import ActivationRecipe, Keep, Recipe, SmoothingRecipe, WeightRecipe

TRAJECTORIES = [cases.steps(seed=s) for s in range(3)]


@pytest.fixture(scope="module")
def graph() -> Graph:
    return cases.graph()


@pytest.fixture(scope="module")
def record(graph: Graph) -> CalibrationRecord:
    return observe(graph, cases.model(TRAJECTORIES))


def recipe(**settings: Any) -> Recipe:
    return Recipe(name="test", summary="", **settings)


def layers(plan: QuantPlan) -> dict[str, LayerPlan]:
    return {layer.name: layer for layer in plan.layers}


def test_plan_of_the_whole_graph(graph: Graph, record: CalibrationRecord) -> None:
    ticks: list[tuple[int, int]] = []
    plan = plan_of(graph, record, recipe(), cases.SPEC, tsw=3, progress=lambda *tick: ticks.append(tick))
    found = layers(plan)
    assert list(found) == ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_o", "context", "time"]
    assert (plan.graph_hash, plan.target, plan.model, len(plan.bins)) == (graph.hash(), "test-int8", "still", 3)
    assert plan.bins_why == "3 even ranges over 6 steps"
    assert found["time"].keep_float == "1 row(s) a call, test-int8 gains from 2 on"
    assert found["attn.to_q"].activation == found["attn.to_k"].activation == found["attn.to_v"].activation
    truth = cases.hidden(TRAJECTORIES)
    for one, quantizer in zip(plan.bins, found["attn.to_q"].activation, strict=True):
        rows = np.concatenate([x for slot, x in truth.items() if slot.t in one.steps])
        assert quantizer.lo == pytest.approx(rows.min(), rel=1e-6)
        assert quantizer.hi == pytest.approx(rows.max(), rel=1e-6)
    weight = cases.weights()["attn.to_q.weight"]
    assert found["attn.to_q"].weight is not None
    np.testing.assert_allclose(found["attn.to_q"].weight.scale, np.abs(weight).max(axis=0) / 127, rtol=1e-6)
    assert ticks[-1] == (5, 5)  # of the quantized ones


def test_the_plan_is_deterministic_and_survives_json(graph: Graph, record: CalibrationRecord) -> None:
    settings = recipe(smoothing=SmoothingRecipe(kind="asq", alpha="search"), activations=ActivationRecipe(range="mse"))
    plans = [plan_of(graph, record, settings, cases.SPEC, tsw="auto") for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    assert QuantPlan.from_json(plans[0].to_json()) == plans[0]


def test_ranges_and_weights_are_those_after_smoothing(graph: Graph, record: CalibrationRecord) -> None:
    plan = plan_of(graph, record, recipe(smoothing=SmoothingRecipe(kind="asq", alpha=0.5)), cases.SPEC, tsw=2)
    found = layers(plan)
    q, v = found["attn.to_q"], found["attn.to_v"]
    assert q.smoothing is not None and q.smoothing == v.smoothing and q.weight is not None
    s = np.array(q.smoothing.scale, np.float32)
    for one, quantizer in zip(plan.bins, q.activation, strict=True):
        rows = np.concatenate([x for slot, x in cases.hidden(TRAJECTORIES).items() if slot.t in one.steps]) / s
        assert (quantizer.lo, quantizer.hi) == (
            pytest.approx(rows.min(), rel=1e-6),
            pytest.approx(rows.max(), rel=1e-6),
        )
    smooth = cases.weights()["attn.to_q.weight"] * s[:, None]
    np.testing.assert_allclose(q.weight.scale, np.abs(smooth).max(axis=0) / 127, rtol=1e-6)


def test_smoothing_brings_a_hard_layer_back() -> None:
    """Output error of to_q, quantized by the plan's numbers, on all rows; one channel is 80 times the others."""
    arrays = cases.weights()
    arrays["attn.to_q.weight"][0] /= 80

    def widen(step: Any) -> None:
        step["inputs"]["x"][..., 0] *= 80

    trajectories = [cases.steps(seed=s, change=widen) for s in range(3)]
    hard = cases.graph(arrays)
    seen = observe(hard, cases.model(trajectories))
    truth = cases.hidden(trajectories)

    def error(settings: Recipe) -> float:
        plan = plan_of(hard, seen, settings, cases.SPEC, tsw=3)
        layer = layers(plan)["attn.to_q"]
        assert layer.weight is not None
        s = np.ones(cases.WIDTH) if layer.smoothing is None else np.array(layer.smoothing.scale)
        step = np.array(layer.weight.scale)
        weight = np.clip(np.rint(arrays["attn.to_q.weight"] * s[:, None] / step), -127, 127) * step
        wrong, power = 0.0, 0.0
        for one, quantizer in zip(plan.bins, layer.activation, strict=True):
            x = np.concatenate([r for slot, r in truth.items() if slot.t in one.steps])
            q = np.clip(np.rint(x / s / quantizer.scale) + quantizer.zero_point, 0, 255)
            y, exact = ((q - quantizer.zero_point) * quantizer.scale) @ weight, x @ arrays["attn.to_q.weight"]
            wrong, power = wrong + np.square(y - exact).sum(), power + np.square(exact).sum()
        return float(wrong / power)

    plain = error(recipe())
    assert error(recipe(smoothing=SmoothingRecipe(kind="asq", alpha="search"))) < 0.05 * plain


def test_keep_float_by_pattern_leaves_shared_inputs_unsmoothed(graph: Graph, record: CalibrationRecord) -> None:
    settings = recipe(
        keep_float=(Keep(match="*.to_k", why="fragile"), Keep(match="*", why="never reached")),
        smoothing=SmoothingRecipe(kind="asq"),
    )
    settings = recipe(keep_float=settings.keep_float[:1], smoothing=settings.smoothing)
    found = layers(plan_of(graph, record, settings, cases.SPEC))
    assert found["attn.to_k"].keep_float == "fragile (recipe: *.to_k)" and not found["attn.to_k"].quantized
    assert found["attn.to_q"].smoothing is None
    assert found["attn.to_q"].smoothing_why == "attn.to_k, kept in float, reads the same value"
    assert found["attn.to_o"].smoothing is not None


def test_everything_kept_float_is_a_plan_too(graph: Graph, record: CalibrationRecord) -> None:
    plan = plan_of(graph, record, recipe(keep_float=(Keep(match="*", why="test"),)), cases.SPEC, tsw="auto")
    assert not any(layer.quantized for layer in plan.layers) and len(plan.bins) == 1


@pytest.mark.parametrize("tsw", [1, 4, "all", "auto"])
@pytest.mark.parametrize("optimal", [False, True])
@pytest.mark.parametrize("per_branch", [False, True])
def test_all_ways_to_choose_bins(
    graph: Graph, record: CalibrationRecord, tsw: Any, optimal: bool, per_branch: bool
) -> None:
    settings = recipe(activations=ActivationRecipe(per_branch=per_branch), smoothing=SmoothingRecipe(kind="asq"))
    plan = plan_of(graph, record, settings, cases.SPEC, tsw=tsw, optimal_bins=optimal)
    assert {b.branch for b in plan.bins} == ({"cond", "uncond"} if per_branch else {"any"})
    assert all(len(x.activation) == len(plan.bins) for x in plan.layers if x.quantized)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (recipe(activations=ActivationRecipe(bits=4)), "4-bit activations, which test-int8 lacks; .*6, 8, 16"),
        (recipe(weights=WeightRecipe(bits=16)), "16-bit weights, which test-int8 lacks; .*4, 8"),
    ],
)
def test_bits_the_target_lacks(graph: Graph, record: CalibrationRecord, settings: Recipe, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_of(graph, record, settings, cases.SPEC)


def test_bits_choose_types_and_grids(graph: Graph, record: CalibrationRecord) -> None:
    settings = recipe(weights=WeightRecipe(bits=4), activations=ActivationRecipe(bits=6))
    layer = layers(plan_of(graph, record, settings, cases.SPEC))["attn.to_q"]
    assert layer.weight is not None and (layer.weight.dtype, layer.weight.qmax) == ("int4", 7)
    one = layer.activation[0]
    assert layer.activation_dtype == "uint8"
    assert one.scale == pytest.approx((one.hi - one.lo) / 63) and 0 <= one.zero_point <= 63


def test_impossible_requests(graph: Graph, record: CalibrationRecord) -> None:
    for tsw in (0, 7):
        with pytest.raises(RecipeError, match=f"--tsw {tsw}"):
            plan_of(graph, record, recipe(), cases.SPEC, tsw=tsw)
    with pytest.raises(CalibrationError, match="another model"):
        plan_of(cases.graph(cases.weights(1)), record, recipe(), cases.SPEC)
