"""--recipe auto: budgets, recipes made from allocations, the choice by measuring, and the search on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests import calib_cases, tiny_model
from vdq_export import auto, compiler, quality, recipe_toml, targets
from vdq_export import recipe as recipes
from vdq_export.auto import Budget, Found, Point
from vdq_export.calib.allocate import Allocation
from vdq_export.calib.sensitivity import Candidate
from vdq_export.errors import ModelError, RecipeError
from vdq_export.graph import Graph
from vdq_export.model import Model, Step
from vdq_export.recipe import Override, Recipe

BASE = Recipe(name="base", summary="test")


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("size=4.2bit", "size", 4.2),
        ("size=4", "size", 4.0),
        (" SIZE = .5 bits ", "size", 0.5),
        ("quality=35dB", "quality", 35.0),
        ("quality=35", "quality", 35.0),
        ("bops=32", "bops", 32.0),
    ],
)
def test_budgets(text: str, kind: str, amount: float) -> None:
    assert Budget.parse(text) == Budget(kind, amount)  # type: ignore[arg-type]
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize(
    "text",
    ["", "4.2", "size", "size=", "size=4.2dB", "quality=35bit", "size=-1", "size=0", "bits=4", "size=4,2", "size=1e9"],
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(RecipeError, match=r"not a budget; for example size=4.2bit, bops=32 or quality=35dB"):
        Budget.parse(text)


def test_a_misspelt_budget() -> None:
    with pytest.raises(RecipeError, match=r"--budget siz=4bit: not a budget; .*; did you mean size\?"):
        Budget.parse("siz=4bit")


# -- what is searched ------------------------------------------------------------------------------------------------


def test_every_format_of_the_target() -> None:
    spec = replace(calib_cases.SPEC, groups=(32, 64), integer=())
    found = auto.combinations(spec, BASE)
    assert {(c.weights, c.activations) for c in found} == {(w, a) for w in (4, 8) for a in (6, 8, 16)}
    assert {c.group for c in found if c.weights == 4} == {0, 32, 64}
    assert {(c.group, c.rank) for c in found if c.weights == 8} == {(0, 0)}


def test_only_what_kernels_multiply() -> None:
    spec = replace(calib_cases.SPEC, groups=(32,), integer=(("uint8", "int8"),))
    assert set(auto.combinations(spec, BASE)) == {Candidate(8, 6, 0, 0), Candidate(8, 8, 0, 0)}
    with pytest.raises(RecipeError, match="no integer formats"):
        auto.combinations(replace(spec, integer=(("int16", "int16"),)), BASE)


def test_every_target_can_be_searched() -> None:
    for name in targets.catalogue():
        for one in auto.combinations(targets.load(name).spec(None), BASE):
            assert one.weights <= auto.MOST_BITS


# -- from allocation to recipe ---------------------------------------------------------------------------------------

MIXED = {
    "blocks.0.to_q": Candidate(4, 8, 0, 0),
    "blocks.0.to_k": Candidate(4, 8, 0, 0),
    "blocks.0.list[1].to_*": Candidate(4, 8, 32, 16),
    "blocks.0.ffn": Candidate(8, 8, 0, 0),
}


def test_the_common_candidate_is_the_recipes_own() -> None:
    found = auto.recipe_for(BASE, Allocation(5.0, 0.1, MIXED), Budget("size", 5.0))
    assert (found.weights.bits, found.weights.group, found.activations.bits, found.low_rank.rank) == (4, 0, 8, 0)
    assert [(o.match, o.weights, o.group, o.rank) for o in found.override] == [
        ("blocks.0.list[[]1].to_[*]", 4, 32, 16),  # brackets and stars of a name are not a pattern's
        ("blocks.0.ffn", 8, 0, 0),
    ]
    assert found.allocate == recipes.AllocateRecipe()
    assert found.verify == BASE.verify


def test_a_quality_budget_is_verified() -> None:
    found = auto.recipe_for(BASE, Allocation(5.0, 0.1, MIXED), Budget("quality", 35.0))
    assert found.verify.min_psnr_db == 35.0 - auto.MARGIN_DB


def test_experts_get_overrides_of_their_own() -> None:
    both = {f"high.{n}": Candidate(4, 8, 0, 0) for n in MIXED} | {"low.blocks.0.ffn": Candidate(8, 8, 0, 0)}
    found = auto.recipe_for(BASE, Allocation(5.0, 0.1, both), Budget("size", 5.0), ["high", "low"])
    assert found.override == ()
    assert found.of_expert("high").override == ()
    assert [(o.match, o.weights) for o in found.of_expert("low").override] == [("blocks.0.ffn", 8)]


# -- a recipe as a file ----------------------------------------------------------------------------------------------


def reread(recipe: Recipe, folder: Path) -> Recipe:
    path = folder / "saved.toml"
    path.write_text(recipe_toml.dump(recipe), encoding="utf-8")
    return recipes.load(path)


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_saving(name: str, tmp_path: Path) -> None:
    assert reread(recipes.load(name), tmp_path) == recipes.load(name)


def test_a_found_recipe_survives_saving(tmp_path: Path) -> None:
    both = {f"high.{n}": c for n, c in MIXED.items()}
    found = auto.recipe_for(BASE, Allocation(5.0, 0.1, both), Budget("quality", 35.0), ["high"])
    assert reread(found, tmp_path) == found


@settings(max_examples=30)
@given(st.text(), st.text())
def test_any_text_survives_saving(tmp_path_factory: pytest.TempPathFactory, match: str, why: str) -> None:
    made = replace(BASE, summary=why, override=(Override(match=match, why=why, weights=4),))
    assert reread(made, tmp_path_factory.getbasetemp()) == made


def test_a_lost_override_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: entries without their default-valued keys taken for empty."""
    found = auto.recipe_for(BASE, Allocation(5.0, 0.1, MIXED), Budget("size", 5.0))
    monkeypatch.setattr(recipe_toml, "_ENTRIES", {"override": found.override[1]})
    assert reread(found, tmp_path) != found


# -- the choice by measuring -----------------------------------------------------------------------------------------


def points(count: int) -> list[Point]:
    """The first one has 8 bits for none of its layers, the last one for all."""
    names = [f"layer{i}" for i in range(count - 1)]
    return [
        Point(
            Allocation(float(k), 1.0 / (1 + k), {n: Candidate(8 if i < k else 4, 8, 0, 0) for i, n in enumerate(names)})
        )
        for k in range(count)
    ]


def meter(asked: list[Recipe], db: Callable[[float], float]) -> Callable[[Recipe], float]:
    """Decibels by the share of layers at 8 bits, read off the recipe itself."""

    def measure(recipe: Recipe) -> float:
        asked.append(recipe)
        others = len(recipe.override)
        return db(others if recipe.weights.bits == 4 else 15 - others)

    return measure


@pytest.mark.parametrize("wanted", [20.0, 20.5, 27.0, 34.9, 35.0])
def test_the_cheapest_that_suffices(wanted: float) -> None:
    asked: list[Recipe] = []
    budget = Budget("quality", wanted)
    found = auto._measured(points(16), BASE, budget, [], meter(asked, lambda high: 20.0 + high), "PSNR")
    assert found.chosen == int(np.ceil(wanted - 20.0))
    assert found.front[found.chosen].db == 20.0 + found.chosen
    assert len(asked) <= 5, "one at the end, then halves of sixteen"
    assert sum(point.db is not None for point in found.front) == len(asked)
    assert f"PSNR {20 + found.chosen:.1f} dB" in found.text()


def test_out_of_reach_names_the_best() -> None:
    with pytest.raises(RecipeError, match=r"quality=50dB: out of reach, .* 35\.0 dB \(PSNR\) at 15\.00 .*=35dB"):
        auto._measured(points(16), BASE, Budget("quality", 50.0), [], meter([], lambda high: 20.0 + high), "PSNR")


def test_the_table_marks_the_choice() -> None:
    found = Found(BASE, tuple(points(3)), 1, Budget("size", 1.0))
    assert list(found.table().columns[0].cells) == ["", "→", ""]
    assert found.builtins()["front"][1]["layers"] == {"4/8": 1, "8/8": 1}


# -- the whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tiny: Model, traced: Graph, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    record = tmp_path_factory.mktemp("auto") / "record.safetensors"
    return auto.search(tiny, budget="size=6.3bit", tsw=1, save_calibration=record, traced={"": traced}), record


def test_the_budget_is_kept_by_what_is_exported(searched: tuple[Found, Path], tiny: Model, traced: Graph) -> None:
    """Bits counted from the plan that the found recipe leads to, not from the allocation."""
    found, record = searched
    planned = compiler.make_plan(
        tiny, target="ort-int8", tsw=1, recipe=found.recipe, calibration=record, traced={"": traced.copy()}
    )
    layers = [layer for layer in planned.plans[0].layers if layer.weight is not None]
    chosen = found.front[found.chosen].allocation.candidates
    assert {layer.name for layer in layers} == set(chosen)
    stored = weights = 0
    for layer in layers:
        assert layer.weight is not None
        one = chosen[layer.name]
        rank = layer.low_rank.rank if layer.low_rank else 0
        assert (layer.weight.bits, layer.activation_bits, layer.weight.group, rank) == one
        k, n = layer.shape
        stored += k * n * layer.weight.bits + 32 * n + 32 * rank * (k + n)
        weights += k * n
    assert 5.5 < stored / weights <= 6.3
    assert stored / weights == pytest.approx(found.front[found.chosen].cost)
    assert len({layer.weight.bits for layer in layers if layer.weight}) > 1
    assert any("allocated for size=6.3bit" in layer.bits_why for layer in layers)


def test_the_front_holds_the_choice(searched: tuple[Found, Path]) -> None:
    found, _ = searched
    costs = [point.cost for point in found.front]
    errors = [point.allocation.error for point in found.front]
    assert costs == sorted(costs)
    assert errors == sorted(errors, reverse=True)
    assert len(costs) > 5


def test_quality_is_measured(traced: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three points; 45 dB lie between the cheapest of this model (about 36) and its best (about 50)."""
    monkeypatch.setattr(auto, "POINTS", 2)
    found = auto.search(tiny_model.build(), budget="quality=45dB", tsw=1, traced={"": traced})
    chosen = found.front[found.chosen]
    assert chosen.db is not None
    assert chosen.db >= 45.0
    assert all(p.db is None or p.db < 45.0 for p in found.front[: found.chosen])
    assert found.how == "SQNR of the output over one trajectory"


def test_the_measured_trajectory_is_not_calibrated_on() -> None:
    model = tiny_model.build()
    kept = list(quality.calibrated(model).iter_trajectories())
    assert len(kept) == len(list(model.iter_trajectories())) - 1
    _, last = quality.held_out(model)
    assert last is not None
    assert not any(torch.equal(last[0]["inputs"]["hidden_states"], t[0]["inputs"]["hidden_states"]) for t in kept)


def test_one_trajectory_serves_twice_and_is_said_to() -> None:
    model = tiny_model.build(trajectories=[tiny_model.trajectory(0)])
    assert quality.calibrated(model) is model
    assert "perhaps calibrated on too" in quality.Meter(model, Path(), Path(), {}, {}).how
    with pytest.raises(ModelError, match="brings no trajectories"):
        quality.held_out(tiny_model.build(trajectories=[]))


class Loop:
    """A sampler of two steps; clips of different cases differ."""

    steps = 2

    def generate(self, denoiser: Any, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        made = tiny_model.inputs(case, 900.0)
        for t in (900.0, 300.0):
            step = {**made, "timestep": torch.tensor([t])}
            with torch.no_grad():
                predicted = denoiser(**step)
            made["hidden_states"] = made["hidden_states"] - 0.1 * quality.first_tensor(predicted)
        clip: np.ndarray = np.clip(made["hidden_states"][0].numpy() / 8 + 0.5, 0.0, 1.0)
        return clip

    def describe(self, case: int) -> str:
        return str(case)

    def settings(self) -> dict[str, Any]:
        return {"name": "loop", "steps": self.steps}


def test_clips_are_measured_where_there_is_a_sampler(
    searched: tuple[Found, Path], traced: Graph, tmp_path: Path
) -> None:
    """More bits, more decibels; the float clips are made once."""
    model = tiny_model.build(sampler=Loop())
    found, record = searched
    measure = quality.Meter(model, tmp_path, record, {"": traced}, {"target": "ort-int8", "tsw": 1})
    low, high = (
        measure(auto.recipe_for(recipes.load("auto"), p.allocation, found.budget))
        for p in (found.front[0], found.front[-1])
    )
    assert 10 < low < high < quality.LIMIT_DB
    assert len(measure._reference) == 2
    assert measure.how == "mean PSNR of 2 clips"
