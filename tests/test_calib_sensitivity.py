"""The table of errors: against the definition, written out, on graphs small enough that nothing is sampled."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from tests import calib_cases as cases
from vdq_export.calib import allocate, sensitivity
from vdq_export.calib.bins import bin_slots, make_bins
from vdq_export.calib.formats import Allocated
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.sensitivity import Candidate, Table, measure
from vdq_export.errors import RecipeError
from vdq_export.graph import Array, Graph, Linear
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.recipe import ActivationRecipe, AllocateRecipe, Override, Recipe

Groups = dict[str, list[Linear]]
PLAIN = Recipe(name="test", summary="test")
CANDIDATES = (Candidate(4, 6), Candidate(8, 6), Candidate(4, 8), Candidate(8, 8))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return cases.graph()


@pytest.fixture(scope="module")
def record(graph: Graph) -> CalibrationRecord:
    return observe(graph, cases.model(), rows=32)


def drafted(graph: Graph, record: CalibrationRecord, recipe: Recipe = PLAIN) -> tuple[QuantPlan, Groups]:
    """Two bins, nothing transformed; the linear over the timestep is no layer."""
    linears = [x for x in graph.linears() if x.rows > 1]
    groups: Groups = {}
    for linear in linears:
        groups.setdefault(linear.value.name, []).append(linear)
    plan = QuantPlan(
        model=record.model,
        graph_hash="",
        target="test-int8",
        recipe=recipe,
        bins=tuple(make_bins(record.steps, [0, 2])),
        layers=tuple(LayerPlan(name=x.name, value=x.value.name, rows=x.rows, shape=x.shape) for x in linears),
        bins_why="",
        draft=True,
    )
    return plan, groups


def by_name(table: Table) -> dict[str, Array]:
    return {layer.name: layer.errors for layer in table.layers}


def by_definition(
    linear: Linear, plan: QuantPlan, record: CalibrationRecord, one: Candidate, rank: int = 0
) -> list[float]:
    """‖XW − X̂Ŵ‖² / ‖XW‖² of every bin: min-max range of all rows, largest magnitude a channel, nearest rounding."""
    value, weight = record.value(linear.value.name), np.asarray(linear.weight.values, np.float64)
    qmax = {4: 7, 8: 127}[one.weights]
    u, s, vt = np.linalg.svd(weight)
    branch = (u[:, :rank] * s[:rank]) @ vt[:rank]
    step = np.abs(weight - branch).max(axis=0) / qmax
    rounded = np.clip(np.rint((weight - branch) / step), -qmax, qmax) * step
    found = []
    for bin_ in plan.bins:
        slots = bin_slots(bin_, record.slots)
        rows = value.sample(slots).astype(np.float64)
        low, high = min(value.lo[slots].min(), 0.0), max(value.hi[slots].max(), 0.0)
        scale = (high - low) / (2**one.activations - 1)
        zero = np.rint(-low / scale)
        quantized = (np.clip(np.rint(rows / scale) + zero, 0, 2**one.activations - 1) - zero) * scale
        error = quantized @ rounded + rows @ branch - rows @ weight
        found.append(float((error**2).sum() / ((rows @ weight) ** 2).sum()))
    return found


def test_the_table_is_its_definition(graph: Graph, record: CalibrationRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2e-3: a float32 quotient next to ½ may round the other way, one of some thousand roundings."""
    monkeypatch.setattr(sensitivity, "ROWS", 10**6)
    plan, groups = drafted(graph, record)
    table = by_name(measure(plan, groups, record, cases.SPEC, CANDIDATES))
    linears = {x.name: x for x in graph.linears()}
    assert set(table) == {x.name for members in groups.values() for x in members}
    for name, errors in table.items():
        wanted = np.array([by_definition(linears[name], plan, record, one) for one in CANDIDATES]).T
        np.testing.assert_allclose(errors, wanted, rtol=2e-3)


def test_a_quantized_branch_would_be_seen(
    graph: Graph, record: CalibrationRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch reads the exact rows; taken from the quantized ones (planted) the error differs by far more."""
    monkeypatch.setattr(sensitivity, "ROWS", 10**6)
    plan, groups = drafted(graph, record)
    one = Candidate(4, 6, rank=2)
    linear = next(x for x in graph.linears() if x.name == "attn.to_o")
    wanted = by_definition(linear, plan, record, one, rank=2)
    right = by_name(measure(plan, groups, record, cases.SPEC, [one]))["attn.to_o"][:, 0]
    np.testing.assert_allclose(right, wanted, rtol=2e-3)
    monkeypatch.setattr(sensitivity._Inputs, "quantized", lambda self, grid: self.exact)
    wrong = by_name(measure(plan, groups, record, cases.SPEC, [one]))["attn.to_o"][:, 0]
    assert np.abs(np.asarray(wrong) / wanted - 1).min() > 0.05


def test_sampling_is_near_the_whole(graph: Graph, record: CalibrationRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the rows, half of the columns: within a factor of three, where two bits of a grid are sixteen."""
    plan, groups = drafted(graph, record)
    monkeypatch.setattr(sensitivity, "ROWS", 10**6)
    whole = by_name(measure(plan, groups, record, cases.SPEC, CANDIDATES))
    monkeypatch.setattr(sensitivity, "ROWS", 60)
    monkeypatch.setattr(sensitivity, "COLUMNS", 3)
    some = by_name(measure(plan, groups, record, cases.SPEC, CANDIDATES))
    ratio = np.concatenate([(some[n] / whole[n]).ravel() for n in whole])
    assert 1 / 3 < ratio.min() < ratio.max() < 3


def test_more_bits_err_less(graph: Graph, record: CalibrationRecord) -> None:
    plan, groups = drafted(graph, record)
    for layer in measure(plan, groups, record, cases.SPEC, CANDIDATES).layers:
        low, weights, activations, high = layer.mean
        assert high < min(weights, activations) < max(weights, activations) < low
        assert layer.share.sum() == pytest.approx(1)


def test_overrides_and_ranks_of_the_recipe_are_what_is_measured(graph: Graph, record: CalibrationRecord) -> None:
    rule = Override(match="attn.to_o", why="test", rank=2)
    plan, groups = drafted(graph, record, Recipe(name="test", summary="", override=(rule,)))
    table = measure(plan, groups, record, cases.SPEC, [Candidate(8, 8), Candidate(8, 8, rank=0)])
    ranks = {layer.name: layer.ranks for layer in table.layers}
    assert ranks.pop("attn.to_o") == (2, 0)
    assert set(ranks.values()) == {(0, 0)}


def test_layers_are_ordered_by_sensitivity(graph: Graph, record: CalibrationRecord) -> None:
    plan, groups = drafted(graph, record)
    ordered = measure(plan, groups, record, cases.SPEC, CANDIDATES).ordered()
    errors = [float(layer.mean[0]) for layer in ordered]
    assert errors == sorted(errors, reverse=True)


def test_a_silent_bin_has_no_error(record: CalibrationRecord) -> None:
    still = cases.weights()
    still["attn.to_o.weight"] = np.zeros_like(still["attn.to_o.weight"])
    quiet = cases.graph(still)
    seen = observe(quiet, cases.model())
    plan, groups = drafted(quiet, seen)
    assert not by_name(measure(plan, groups, seen, cases.SPEC, CANDIDATES))["attn.to_o"].any()


def test_scales_computed_at_run_time_are_simulated(graph: Graph, record: CalibrationRecord) -> None:
    """Rows of very different size: their own scales err less than one for all of them."""
    plan, groups = drafted(graph, record)
    fixed = measure(plan, groups, record, cases.SPEC, [Candidate(8, 6)])
    settings = Recipe(name="test", summary="", activations=ActivationRecipe(granularity="token"))
    token = measure(replace(plan, recipe=settings), groups, record, cases.SPEC, [Candidate(8, 6)])
    assert np.mean([x.mean for x in token.layers]) < 0.8 * np.mean([x.mean for x in fixed.layers])


def test_bits_the_target_lacks(graph: Graph, record: CalibrationRecord) -> None:
    plan, groups = drafted(graph, record)
    with pytest.raises(RecipeError, match="6-bit weights, which test-int8 lacks; it offers: 4, 8"):
        measure(plan, groups, record, cases.SPEC, [Candidate(6, 8)])
    with pytest.raises(RecipeError, match="no bits to choose from"):
        measure(plan, groups, record, cases.SPEC, [])


# -- from recipe to bits ---------------------------------------------------------------------------------------------


def test_a_recipe_without_a_budget_allocates_nothing(graph: Graph, record: CalibrationRecord) -> None:
    assert allocate.choose(*drafted(graph, record), record, cases.SPEC) == {}


def test_a_recipe_with_a_budget(graph: Graph, record: CalibrationRecord) -> None:
    """Widths of 5 and 6: a scale of 32 bits an output channel is 5.3 bits a weight, and more."""
    budget = AllocateRecipe(size=11.5, weights=(4, 8))
    plan, groups = drafted(graph, record, Recipe(name="test", summary="", allocate=budget))
    found = allocate.choose(plan, groups, record, cases.SPEC)
    assert found.keys() == {x.name for members in groups.values() for x in members}
    assert {one.weights for one in found.values()} == {4, 8}
    assert all(isinstance(one, Allocated) and "of 11.5 bits a weight" in one.why for one in found.values())
    shapes = {x.name: x.shape for x in graph.linears()}
    stored = sum(k * n * found[name].weights + 32 * n for name, (k, n) in shapes.items() if name in found)
    assert stored <= 11.5 * sum(k * n for name, (k, n) in shapes.items() if name in found)


def test_two_budgets_are_one_too_many(graph: Graph, record: CalibrationRecord) -> None:
    settings = AllocateRecipe(size=5, bops=32)
    plan, groups = drafted(graph, record, Recipe(name="test", summary="", allocate=settings))
    with pytest.raises(RecipeError, match="two budgets"):
        allocate.choose(plan, groups, record, cases.SPEC)
