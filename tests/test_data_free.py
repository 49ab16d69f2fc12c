"""Recipes that need no calibration data: exported without running the network once, refused where data is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests import clip_model, tiny_model
from vdq_export import pipeline
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.solve import solve
from vdq_export.compiler import export
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError, RecipeError
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.runtime import load
from vdq_export.targets import ort_int8, qnn
from vdq_export.verify import verify

FREE = {"w8a16", "w4a16-rtn", "w8a8-dynamic", "mxfp8"}
SPEC = ort_int8.spec("avx_vnni")


class Untouched:
    """Trajectories that nobody may ask for."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("the network was run")


def blind(tiny: Model) -> Model:
    return Model(tiny.module, tiny.example_inputs, Untouched(), name="tiny")


def output_db(bundle: Bundle, reference: Any) -> float:
    signal = noise = 0.0
    with load(bundle.path, threads=1) as transformer:
        for step in tiny_model.trajectory(3):
            with transformer.cache_context(step["branch"]):
                found = transformer(**step["inputs"]).sample
            exact = reference(**step["inputs"])
            signal, noise = signal + float(exact.square().sum()), noise + float((exact - found).square().sum())
    return 10 * float(np.log10(signal / max(noise, 1e-30)))


def test_which_recipes_need_data() -> None:
    assert {name for name in recipes.names() if not recipes.load(name).needs_data} == FREE
    assert recipes.load("w4a16-g64").data_uses == ("GPTQ",)
    assert set(recipes.load("static-asq").data_uses) == {"static activation ranges", "smoothing"}
    assert "a schedule that follows the output" in recipes.load("dvd-w4a6").data_uses


@pytest.mark.parametrize(
    ("name", "target", "least"),
    [("w8a16", "ort-int8", 53.0), ("w4a16-rtn", "ort-int8", 30.0), ("w8a8-dynamic", "reference", 48.0)],
)
def test_exported_without_running_the_network(
    name: str, target: str, least: float, tiny: Model, traced: Graph, tmp_path: Path
) -> None:
    bundle = export(
        blind(tiny), recipe=name, target=target, isa="avx_vnni" if target == "ort-int8" else None,
        out=tmp_path / "out", traced={"": traced.copy()}, workers=1,
    )  # fmt: skip
    # Least of w8a16: onnxruntime's default for weights alone rounds activations to 8 bits and has 51.4 dB.
    assert output_db(bundle, tiny) > least
    assert len(bundle.schedule.bins) == 1 and bundle.schedule.select(123.4, "uncond") == 0
    report = verify(bundle, tiny, clips=0)
    assert report.verdict == "pass", report.failures


def test_weights_are_those_of_a_plan_made_with_data(tiny: Model, traced: Graph) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    solved = []
    for record in (CalibrationRecord.empty(graph, tiny), observe(graph, tiny, threads=1)):
        one = draft(Network(graph, record, recipes.load("w8a16"), SPEC))[0]
        solved.append(solve(one, graph, record, SPEC))
    blind_plan, seeing = (one.plan for one in solved)
    assert [layer.weight for layer in blind_plan.layers] == [layer.weight for layer in seeing.layers]
    assert sum(layer.weight is not None for layer in blind_plan.layers) == 20
    assert blind_plan.bins[0].steps == () and len(seeing.bins[0].steps) == len(tiny_model.TIMESTEPS)


def test_timesteps_that_the_sampler_tells_are_the_steps(tiny: Model, traced: Graph) -> None:
    class Sampler(clip_model.Sampler):
        steps, timesteps = 2, torch.tensor([20.0, 1000.0])

        def settings(self) -> dict[str, Any]:
            return {"name": "test"}

    model = Model(tiny.module, tiny.example_inputs, Untouched(), sampler=Sampler())
    record = CalibrationRecord.empty(traced, model)
    assert record.steps == (1000.0, 20.0) and not record.has_data and record.sampler == {"name": "test"}
    assert draft(Network(traced, record, recipes.load("w8a16"), SPEC))[0].bins[0].steps == (1000.0, 20.0)


def test_an_expert_keeps_to_its_range(tiny: Model, traced: Graph) -> None:
    network = Network(traced, CalibrationRecord.empty(traced, tiny), recipes.load("w8a16"), SPEC, "high", (550.0, None))
    only = draft(network, first=3)[0].bins[0]
    assert only.index == 3 and only.t[0] == 550.0 and only.t[1] > 1000


def test_a_record_without_data_survives_its_file(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    CalibrationRecord.empty(traced, tiny).save(tmp_path / "none.safetensors")
    again = CalibrationRecord.load(tmp_path / "none.safetensors", traced.hash())
    assert not again.has_data and not again.values
    with pytest.raises(CalibrationError, match="no calibration data about 'x'"):
        again.value("x")


@pytest.mark.parametrize(
    ("recipe", "spec", "tsw", "error", "message"),
    [
        ("static-asq", SPEC, 1, CalibrationError, "needs calibration data: static activation ranges, smoothing"),
        ("w8a16", SPEC, 4, RecipeError, "--tsw 4: .*one time range"),
        ("w8a16", SPEC, "auto", RecipeError, "--tsw auto: .*one time range"),
        ("w8a16", qnn.spec(), 1, RecipeError, "qnn leaves no operator in float"),
    ],
)
def test_refused_with_the_reason(
    recipe: str, spec: Any, tsw: Any, error: type[Exception], message: str, tiny: Model, traced: Graph
) -> None:
    network = Network(traced, CalibrationRecord.empty(traced, tiny), recipes.load(recipe), spec)
    with pytest.raises(error, match=message):
        draft(network, tsw=tsw)


def test_a_static_recipe_still_runs_the_network(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the network was run"):
        export(blind(tiny), recipe="static-minmax", out=tmp_path / "out", traced={"": traced.copy()})


def test_a_recipe_of_ones_own(tiny: Model) -> None:
    free = recipes.load("w8a16")
    assert not free.needs_data
    smoothed = msgspec.structs.replace(free, smoothing=recipes.SmoothingRecipe(kind="asq"))
    assert smoothed.data_uses == ("smoothing",)
