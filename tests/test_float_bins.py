"""keep_float with `bins`: a layer is float in those bins' graphs, and nothing else changes anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vdq_export import recipe as recipes
from vdq_export import recipe_toml
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.errors import PlanError, RecipeError
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.plan import QuantPlan
from vdq_export.recipe import Keep, Recipe
from vdq_export.verify import count_kernels

LAYER = "blocks.1.ffn.net.0.proj"
WHY = "put back for the test"
BASE = recipes.load("svdquant")  # smoothing, low-rank branches and groups: all have to be left where they are
Made = dict[str, Bundle]


def keeping(*bins: int, base: Recipe = BASE) -> Recipe:
    rule = Keep(match="blocks.1.ffn.net.0.*", why=WHY, bins=bins)
    return msgspec.structs.replace(base, keep_float=(*base.keep_float, rule))


@pytest.fixture(scope="module")
def bundles(tiny: Model, traced: Graph, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """svdquant in two bins: as it is, with LAYER in float in bin 1, and in both."""
    folder = tmp_path_factory.mktemp("float")
    record, made = folder / "record.safetensors", {}
    for name, recipe in (("plain", BASE), ("second", keeping(1)), ("both", keeping(0, 1))):
        known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
        settings = {"tsw": 2, "traced": {"": traced.copy()}, "workers": 1, **known}
        made[name] = export(tiny, recipe=recipe, out=folder / name, **settings)
    return made


def constants(bundle: Bundle, index: int) -> dict[str, np.ndarray[Any, Any]]:
    return {one.name: np.asarray(one.values) for one in Graph.load(bundle.graph_path(index)).constants()}


def test_the_other_bins_graph_is_what_it_was(bundles: Made) -> None:
    before, after = constants(bundles["plain"], 0), constants(bundles["second"], 0)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [n.name for n in Graph.load(bundles["plain"].graph_path(0)).nodes] == [
        n.name for n in Graph.load(bundles["second"].graph_path(0)).nodes
    ]


def test_in_its_bin_the_layer_is_float_and_the_rest_as_it_was(bundles: Made) -> None:
    before, after = constants(bundles["plain"], 1), constants(bundles["second"], 1)
    assert f"{LAYER}.weight.int8" in before and not any(name.startswith(f"{LAYER}.weight.int8") for name in after)
    assert not [name for name in after if name.startswith(LAYER) and ("low_rank" in name or "scale" in name)]
    shared = [name for name in before if ".weight.int8" in name and not name.startswith(LAYER)]
    assert len(shared) == 19
    assert all(np.array_equal(before[name], after[name]) for name in shared)
    linear = next(x for x in Graph.load(bundles["second"].graph_path(1)).linears() if x.name == LAYER)
    plain = next(x for x in bundles["second"].plan.layers if x.name == LAYER)
    assert plain.smoothing is not None and linear.read_weight().dtype == np.float32
    # The smoothed weight: that of the model, its channels multiplied.
    whole = next(x for x in Graph.load(bundles["both"].graph_path(0)).linears() if x.name == LAYER)
    assert np.array_equal(whole.read_weight(), linear.read_weight())


def test_weights_are_stored_once(bundles: Made) -> None:
    """One float weight more; in float in both bins, its integers, scales and branch are gone."""
    sizes = {name: sum(e.size for e in b.manifest.files if "weights" in e.path) for name, b in bundles.items()}
    k, n = next(x for x in bundles["plain"].plan.layers if x.name == LAYER).shape
    assert 4 * k * n <= sizes["second"] - sizes["plain"] <= 4 * k * n + 4096  # a page of alignment
    assert sizes["both"] + k * n <= sizes["second"]


def test_the_plan_says_why(bundles: Made) -> None:
    plans = [QuantPlan.from_json(bundles[name].plan.to_json()) for name in ("plain", "second", "both")]
    found = [next(x for x in plan.layers if x.name == LAYER).float_in for plan in plans]
    why = f"{WHY} (recipe: blocks.1.ffn.net.0.*)"
    assert found == [(), ("", why), (why, why)]
    assert [x.name for x in plans[1].of_bin(plans[1].bins[0]).layers if x.keep_float == why] == []
    assert [x.name for x in plans[1].of_bin(plans[1].bins[1]).layers if x.keep_float == why] == [LAYER]
    layer = next(x for x in plans[1].layers if x.name == LAYER)
    with pytest.raises(PlanError, match="2 entries"):
        msgspec.structs.replace(plans[1], layers=(msgspec.structs.replace(layer, float_in=(why,)),))


def test_kernels_are_counted_where_they_are_planned(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tsw": 2, "traced": {"": traced.copy()}, "workers": 1}
    made = export(tiny, recipe=keeping(1, base=recipes.load("static-minmax")), out=tmp_path / "out", **settings)
    kernels, floating = count_kernels(made)
    layers = sum(x.quantized for x in made.plan.of_bins().layers)
    assert (kernels.planned, kernels.executed, floating) == (2 * layers - 1, 2 * layers - 1, [])


def test_what_is_refused(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tsw": 2, "traced": {"": traced.copy()}, "workers": 1, "out": tmp_path / "out"}
    with pytest.raises(RecipeError, match=r"in float in bin 2, which there is not; the bins are 0 to 1"):
        export(tiny, recipe=keeping(1, 2, base=recipes.load("static-minmax")), **settings)
    with pytest.raises(RecipeError, match=r"qnn leaves nothing in float; override its bits instead: activations = 16"):
        export(tiny, target="qnn", recipe=keeping(1, base=recipes.load("static-minmax")), **settings)
    assert not (tmp_path / "out").exists()


def test_the_recipe_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "saved.toml"
    path.write_text(recipe_toml.dump(keeping(0, 3)), encoding="utf-8")
    assert recipes.load(path) == keeping(0, 3)
    path.write_text('extends = "static-asq"\n[[keep_float]]\nmatch = "*"\nwhy = "x"\nbins = [-1]\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="keep_float"):
        recipes.load(path)
