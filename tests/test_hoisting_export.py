"""Hoisting in exported bundles: the same function as without, in files that say what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from tests.families import FAMILIES
from vdq_export import export, load
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.recipe import Keep
from vdq_export.report.hoisting import HOISTING, HoistingReport
from vdq_export.verify import verify

FLOAT = replace(
    recipes.load("static-minmax"), name="float", keep_float=(Keep(match="*", why="to see the parts alone"),)
)
HOISTED = {"Wan": {"prompt", "step"}, "HunyuanVideo": {"prompt", "step", "mixed"}}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: FAMILIES[name]() for name in HOISTED}


def outputs(bundle: Bundle, model: Model) -> np.ndarray:
    made = []
    with load(bundle.path, threads=1) as transformer:
        for step in next(iter(model.iter_trajectories())):
            with transformer.cache_context(step["branch"]):
                made.append(transformer(**step["inputs"]).sample.numpy())
    return np.stack(made)


@pytest.mark.parametrize("family", HOISTED)
def test_in_float_nothing_changes(family: str, models: dict[str, Model], tmp_path: Path) -> None:
    """No quantizer anywhere: what is left are sums in another order, 1e-6, where a wrong part gives 1e-2 and more."""
    model = models[family]
    bundles = [export(model, recipe=FLOAT, tsw=2, out=tmp_path / str(h), hoist=h, workers=1) for h in (True, False)]
    hoisted, whole = (outputs(bundle, model) for bundle in bundles)
    assert np.abs(hoisted - whole).max() <= 1e-5 * np.abs(whole).max()
    (entry,) = bundles[0].schedule.hoisted
    named = {"prompt": entry.prompt, "step": entry.step, "mixed": entry.mixed}
    assert {part for part, path in named.items() if path} == HOISTED[family]
    assert entry.bins == (0, 1) and len(entry.timesteps) == 4
    assert bundles[1].schedule.hoisted == ()
    assert not [e.path for e in bundles[1].manifest.files if "prompt" in e.path or e.path.startswith("tables/")]


@pytest.mark.parametrize("family", HOISTED)
def test_quantized(family: str, models: dict[str, Model], tmp_path: Path) -> None:
    """Hoisted linears have 8-bit weights, no ranges, and are in the graph that the plan says; verify sees them."""
    bundle = export(models[family], recipe="static-minmax", tsw=2, out=tmp_path / "b", workers=1)
    hoisted = [layer for layer in bundle.plan.layers if layer.hoisted]
    assert {layer.hoisted for layer in hoisted} == HOISTED[family]
    (entry,) = bundle.schedule.hoisted
    for part, path in (("prompt", entry.prompt), ("step", entry.step), ("mixed", entry.mixed)):
        held = onnx.load(bundle.path / path, load_external_data=False).graph.initializer if path else ()
        integers = {one.name.removesuffix(".weight.int8") for one in held if one.name.endswith(".weight.int8")}
        assert integers == {layer.name for layer in hoisted if layer.hoisted == part and layer.quantized}
    report = verify(bundle, models[family], clips=0)
    measured = {one.layer: one.sqnr_db for one in report.layers}
    assert all(measured[layer.name] > 30 for layer in hoisted if layer.quantized)
    float_outputs = np.stack(
        [models[family](**step["inputs"]).numpy() for step in next(iter(models[family].iter_trajectories()))]
    )
    assert sqnr_db(float_outputs, outputs(bundle, models[family])) > 25


def test_report(models: dict[str, Model], tmp_path: Path) -> None:
    bundle = export(models["Wan"], recipe="static-minmax", out=tmp_path / "b", workers=1)
    (found,) = HoistingReport.from_json((bundle.path / HOISTING).read_bytes()).networks
    assert set(found.parts) == {"prompt", "step", "body"}
    assert 0 < found.moved < 1 and 0 < found.saved < 1
    body = onnx.load(bundle.graph_path(0), load_external_data=False).graph
    assert found.values == len([one for one in body.input if one.name != "hidden_states"])
    assert f"{found.values} values" in found.in_words()


def test_bins_with_weights_of_their_own_have_parts_of_their_own(models: dict[str, Model], tmp_path: Path) -> None:
    bundle = export(models["Wan"], recipe="static-tsq-tsw", tsw=2, out=tmp_path / "b", workers=1)
    assert [one.bins for one in bundle.schedule.hoisted] == [(0,), (1,)]
    assert [one.prompt for one in bundle.schedule.hoisted] == [f"graphs/prompt.bin0{i}.onnx" for i in (0, 1)]
    assert [len(one.timesteps) for one in bundle.schedule.hoisted] == [2, 2]
    assert outputs(bundle, models["Wan"]).shape[0] == 8
