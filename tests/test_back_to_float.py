"""bisect: the graphs it measures on, effects, and a spoilt layer found and mended from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace as with_changes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import numpy as np
import pytest

from tests import clip_model
from tests.commands import command
from vdq_export import ort, targets
from vdq_export import recipe as recipes
from vdq_export.bisect import back_to_float
from vdq_export.bisect.candidates import Place, candidates, effects
from vdq_export.bisect.cost import cost
from vdq_export.bisect.fixed_recipe import fixed_recipe
from vdq_export.bisect.float_layers import put_back
from vdq_export.bundle import Bundle
from vdq_export.commands.bisect import bisect_command
from vdq_export.compiler import export
from vdq_export.errors import ModelError, RecipeError
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.plan import Bin
from vdq_export.progress import Reporter
from vdq_export.recipe import Keep, Override, Recipe
from vdq_export.runtime import families
from vdq_export.runtime.ahead import Ahead
from vdq_export.verify import float_graphs, make_clips

BAD = "blocks.1.ffn.net.0.proj"
WANTED = 100.0  # dB: far above what the spoilt layer leaves (84), below the rest in 16 bits (124)


# -- the graphs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny: Model) -> Model:
    return with_changes(tiny, sampler=clip_model.Sampler(), name="tests.clip_model:build")


@pytest.fixture(autouse=True)
def traced_before(traced: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is tested elsewhere, and takes seconds."""
    monkeypatch.setattr("vdq_export.verify.trace", lambda model, tolerance: traced.copy())


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record") / "record.safetensors"


@pytest.fixture(scope="module")
def make(model: Model, traced: Graph, record: Path) -> Callable[..., Bundle]:
    def made(recipe: Any, out: Path, **choices: Any) -> Bundle:
        known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
        return export(model, recipe=recipe, out=out, traced={"": traced.copy()}, workers=1, **known, **choices)

    return made


def spoilt(base: str = "static-asq") -> Recipe:
    """16 bits, which lose nothing to speak of, and one layer in 4."""
    fine = [Override(match="*", why="fine", weights=16, activations=16)]
    bad = Override(match=BAD, why="made bad", weights=4, activations=4)
    return msgspec.structs.replace(recipes.load(base), name="spoilt", override=(*fine, bad))


@pytest.fixture(scope="module")
def bad(make: Callable[..., Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(spoilt(), tmp_path_factory.mktemp("bad") / "bad", tsw=2)


@pytest.mark.parametrize(("name", "target"), [("svdquant", "ort-int8"), ("w8a8-dynamic", "reference")])
def test_put_back_a_graph_is_the_float_one(
    name: str, target: str, make: Callable[..., Bundle], model: Model, tmp_path: Path
) -> None:
    """Low-rank branches, groups and quantizers computed at run time go with the integers, layers behind stay wired."""
    bundle = make(name, tmp_path / "out", target=target, tsw=1 if "dynamic" in name else 2)
    plan, floated, steps = next(iter(float_graphs(bundle, model, Reporter())))
    step, graph = steps[0], Graph.load(bundle.graph_path(0))
    ahead = Ahead(bundle)

    def output(one: Graph) -> np.ndarray[Any, Any]:
        session = ort.session(one, options=bundle.manifest.session)
        feeds = ahead.arrays(0, session, {key: value.numpy() for key, value in step["inputs"].items()})
        made: np.ndarray[Any, Any] = session.run(["sample"], feeds)[0]
        return made

    exact = model(**step["inputs"]).numpy()
    before = np.abs(output(graph) - exact).max()
    names = {x.name for x in plan.of_bins().layers if x.quantized}
    put_back(graph, [x for x in floated.linears() if x.name in names])
    left = [n.name for n in graph.nodes if "Quantize" in n.op or "LowRank" in n.name or "Dynamic" in n.name]
    assert left == []
    # Hoisted layers stay in 8 bits: the prompt's, which move the output by thousandths.
    assert np.abs(output(graph) - exact).max() < min(0.02, before / 3)


def test_effects_are_of_the_layer_alone_in_its_bin(bad: Bundle, model: Model) -> None:
    """The bad layer makes up its bin's error, and the layer behind it none of it."""
    found, calls = candidates(bad, model, Reporter())
    falls, whole = effects(bad, found, calls, Reporter())
    assert sum(falls[Place(BAD, index)] for index in (0, 1)) == pytest.approx(whole, rel=0.02)
    assert min(falls[Place(BAD, index)] for index in (0, 1)) > 0.1 * whole
    assert max(abs(fall) for place, fall in falls.items() if place.layer != BAD) < 0.02 * whole
    assert len(found) == len(falls) == 2 * sum(x.quantized for x in bad.plan.of_bins().layers)
    assert [calls[index].count for index in (0, 1)] == [2 * len(one.steps) for one in bad.plan.bins]


# -- from end to end -------------------------------------------------------------------------------------------------


def test_a_spoilt_layer_is_found_and_mended(
    bad: Bundle, model: Model, make: Callable[..., Bundle], tmp_path: Path
) -> None:
    """The command names that layer alone; the bundle its recipe makes has the PSNR it said, at the cost it said."""
    code, out, err = command(
        "bisect", bad.path, "--psnr", str(WANTED), "--clips", "1", "--out", "fix.toml", "--json", cwd=tmp_path
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["outcome"] == "fixed" and found["minimal"]
    assert sorted((one["layer"], one["bin"]) for one in found["members"]) == [(BAD, 0), (BAD, 1)]
    assert sum(one["share"] for one in found["members"]) == pytest.approx(1.0, abs=0.02)
    assert len(found["effects"]) == found["candidates"] and found["effects"][:2] == found["members"]
    assert found["bundle_db"] < WANTED - 5 and found["runs"] <= 6
    assert found["float_db"] >= found["fixed_db"] >= WANTED
    assert "--recipe fix.toml" in found["command"] and "tests.clip_model:build" in found["command"]
    mended = make(tmp_path / "fix.toml", tmp_path / "mended")  # bins too: the recipe says how many
    made = make_clips(mended, model, 1, Reporter())
    assert made.mean_psnr_db() == pytest.approx(found["fixed_db"], abs=0.05)
    assert mended.plan.bins == bad.plan.bins

    def weights(bundle: Bundle) -> int:
        return sum(entry.size for entry in bundle.manifest.files if "weights" in entry.path)

    # Beside the matrix: bias and scales of the quantized layer, and alignment.
    assert weights(mended) - weights(bad) == pytest.approx(found["cost"]["bytes"], abs=600)
    assert found["cost"]["bins"] == [0, 1]
    shares = [float_share(bundle) for bundle in (bad, mended)]
    assert [found["cost"]["float_before"], found["cost"]["float_after"]] == pytest.approx(shares)
    assert found["cost"]["sessions_after"] == sessions(mended) == found["cost"]["sessions_before"] == sessions(bad)
    again = back_to_float.bisect(mended, model, psnr=WANTED, clips=1)
    assert (again.outcome, again.runs, again.members) == ("nothing to do", 1, ())


def float_share(bundle: Bundle) -> float:
    """Of the multiply-adds of the linears of a clip."""
    work = {True: 0, False: 0}
    for one in bundle.plan.bins:
        for layer in bundle.plan.of_bin(one).layers:
            work[layer.quantized] += layer.rows * layer.shape[0] * layer.shape[1] * len(one.steps)
    return work[False] / sum(work.values())


def sessions(bundle: Bundle) -> int:
    return len(families.find([bundle.graph_path(index) for index in range(len(bundle.schedule.bins))]))


def test_a_layer_in_one_bin_costs_a_session_and_keeps_its_integers(bad: Bundle, model: Model) -> None:
    found, _ = candidates(bad, model, Reporter())
    one, both = (cost(bad, found, frozenset(Place(BAD, i) for i in bins)) for bins in ((1,), (0, 1)))
    layer = next(x for x in bad.plan.layers if x.name == BAD)
    elements = layer.shape[0] * layer.shape[1]
    assert (one.bytes, both.bytes) == (4 * elements, 3 * elements), (
        "float beside integers of a byte, and in their place"
    )
    assert (one.sessions_before, one.sessions_after, one.bins) == (1, 2, (1,))
    assert one.float_after < both.float_after


def test_what_people_read(bad: Bundle, tmp_path: Path) -> None:
    code, out, _ = command("bisect", bad.path, "--psnr", str(WANTED), "--clips", "1", "--quiet", cwd=tmp_path)
    assert code == 0
    assert re.search(rf"with these 2 in float: [\d.]+ dB; none can be left out\n  {re.escape(BAD)} in bin00 \(\+", out)
    assert "costs: weights +0.0" in out and "graphs that change: bin00, bin01" in out
    assert 'extends = "' in out or "[[keep_float]]" in out
    assert "export it: vdq-export tests.clip_model:build --target ort-int8" in out


def test_gain_runs_and_what_is_out_of_reach(bad: Bundle, model: Model) -> None:
    lost = back_to_float.bisect(bad, model, psnr=400.0, clips=1)
    assert (lost.outcome, lost.runs, lost.recipe) == ("unreachable", 2, "")
    assert lost.float_db is not None and lost.float_db < 400
    assert lost.note == "", "nothing of this model runs ahead in 8 bits"
    short = back_to_float.bisect(bad, model, gain=WANTED - lost.bundle_db, clips=1, runs=2)
    assert short.wanted_db == pytest.approx(WANTED)
    assert (short.outcome, short.minimal, short.runs, len(short.members)) == ("fixed", False, 4, 2)


def test_layers_that_run_ahead_are_named_where_they_may_be_the_limit() -> None:
    ahead = [SimpleNamespace(name=f"adaln.{n}", quantized=True, hoisted="step") for n in range(4)]
    others = [SimpleNamespace(name=f"blocks.{n}", quantized=True, hoisted="") for n in range(9)]
    bundle: Any = SimpleNamespace(plans=[SimpleNamespace(layers=[*others, *ahead])] * 2)
    told = "4 layers that run ahead have 8-bit weights (adaln.0, adaln.1, adaln.2, …); "
    assert back_to_float._ahead(bundle).startswith(told)


def test_what_is_refused(bad: Bundle, model: Model) -> None:
    with pytest.raises(ModelError, match="no sampler, so there are no clips"):
        back_to_float.bisect(bad, with_changes(model, sampler=None), psnr=40.0)
    isa = targets.load("qnn").spec(None).isa
    hexagon = with_changes(bad, manifest=msgspec.structs.replace(bad.manifest, target="qnn", isa=isa))
    with pytest.raises(RecipeError, match=r"qnn leaves nothing in float.*activations = 16"):
        back_to_float.bisect(hexagon, model, psnr=40.0)
    for words in ([], ["--psnr", "40", "--gain", "3"]):
        with pytest.raises(click.UsageError, match="one of --psnr and --gain"):
            bisect_command.main([str(bad.path), *words], standalone_mode=False)
    with pytest.raises(click.UsageError, match=r"ends in \.toml"):
        bisect_command.main([str(bad.path), "--psnr", "40", "--out", "fix"], standalone_mode=False)


# -- the recipe ------------------------------------------------------------------------------------------------------


def with_recipe(bundle: Bundle, recipe: Recipe, steps: tuple[int, ...] = (3, 3)) -> Bundle:
    """`bundle` as if made with `recipe`, in bins of so many steps."""
    bins, t = list[Bin](), 1000.0
    for index, count in enumerate(steps):
        mine = tuple(t - 10 * i for i in range(count))
        bins.append(Bin(index=index, t=(mine[-1], mine[0]), steps=mine))
        t = mine[-1] - 10
    plan = msgspec.structs.replace(bundle.plan, bins=tuple(bins), recipe=recipe, layers=(), attentions=())
    return with_changes(bundle, manifest=msgspec.structs.replace(bundle.manifest, recipe=recipe), plans=(plan,))


def read(text: str) -> Recipe:
    return recipes.parse(text)


def test_the_recipe_extends_the_bundles(bad: Bundle) -> None:
    own = recipes.load("svdquant")
    text = fixed_recipe(with_recipe(bad, own), [Place("a[0]", 1), Place("b", 0), Place("a[0]", 0)], "why")[0]
    assert text.startswith('extends = "svdquant"\n') and len(text.splitlines()) < 20
    found = read(text)
    new = (Keep(match="a[[]0]", why="why", bins=(0, 1)), Keep(match="b", why="why", bins=(0,)))
    assert found.keep_float == (*own.keep_float, *new)
    assert msgspec.structs.replace(
        found, keep_float=own.keep_float, name=own.name, summary=own.summary, tsw=own.tsw
    ) == own  # fmt: skip
    assert found.tsw == 2


def test_a_recipe_from_elsewhere_is_written_in_full(bad: Bundle) -> None:
    for own in (spoilt(), msgspec.structs.replace(recipes.load("svdquant"), keep_float=())):
        text = fixed_recipe(with_recipe(bad, own), [Place("b", 0)], "why")[0]
        assert "extends" not in text
        found = read(text)
        assert found.override == own.override
        assert found.keep_float == (*own.keep_float, Keep(match="b", why="why", bins=(0,)))


@pytest.mark.parametrize(
    ("steps", "tsw"), [((6,), 1), ((1, 2, 2), 3), ((2, 1, 2), (0.4, 0.6)), ((1, 1, 1), 3), ((1, 5), (1 / 6,))]
)
def test_the_recipe_has_the_bins_there_are(bad: Bundle, steps: tuple[int, ...], tsw: Any) -> None:
    text = fixed_recipe(with_recipe(bad, recipes.load("static-asq"), steps), [Place("b", 0)], "why")[0]
    assert read(text).tsw == tsw


def test_bins_that_no_one_setting_gives_get_no_recipe(bad: Bundle) -> None:
    """Bins that were chosen for each branch apart: members go by number, and would be other steps."""
    bundle = with_recipe(bad, recipes.load("static-asq"), (2, 4, 3, 3))
    branches = ("cond", "cond", "uncond", "uncond")
    bins = [msgspec.structs.replace(one, branch=b) for one, b in zip(bundle.plan.bins, branches, strict=True)]
    odd = with_changes(bundle, plans=(msgspec.structs.replace(bundle.plan, bins=tuple(bins)),))
    text, note = fixed_recipe(odd, [Place("b", 0)], "why")
    assert text == "" and "no one `tsw` gives them again" in note
