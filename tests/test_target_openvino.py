"""Target openvino: OpenVINO itself reads the graphs, runs linears in integers, and computes what onnxruntime does.

The planted faults are what it does silently: saturation without VNNI, bfloat16, rounding at run time, dropped clamps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tests import hoisted_bundle, tiny_model
from tests.bin_feeds import bin_feeds
from tests.openvino_models import CASES, Case, case_input, double_weights, expected, run_without_vnni, sqnr_of
from vdq_export import ort, targets
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.devices import openvino_runtime
from vdq_export.devices.verify_openvino import MAX_DROP_DB, compare
from vdq_export.errors import CompileError, MissingToolError, RecipeError, UnknownNameError
from vdq_export.graph import Graph
from vdq_export.lint import lint_graphs
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, first_tensor
from vdq_export.recipe import load as load_recipe
from vdq_export.runtime import load
from vdq_export.samples import digits
from vdq_export.verify import count_kernels

openvino = pytest.importorskip("openvino")
TARGET = targets.load("openvino")
BY_NAME = {case.name: case for case in CASES}
HAS_VNNI = targets.load("ort-int8").detect_isa() in ("avx_vnni", "avx512_vnni")
EXACT_DB = 100.0  # float32 sums of 256 products in another order differ at 130 dB


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def tiny_bundle(folder: Path, tiny: Model, traced: Graph) -> Bundle:
    return export(
        tiny, target="openvino", tsw=2, recipe="static-minmax", out=folder / "tiny", traced={"": traced.copy()},
        save_calibration=folder / "tiny.safetensors", workers=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def sample() -> Model:
    """Digits, with every third call of one trajectory, made once."""
    model = digits.load(calibration_cases=1)
    model.trajectories = [list(next(iter(model.iter_trajectories())))[::3]]
    return model


@pytest.fixture(scope="module")
def digits_bundle(folder: Path, sample: Model) -> Bundle:
    return export(sample, target="openvino", tsw=2, recipe="static-minmax", out=folder / "digits", workers=1)


def test_every_graph_of_tiny_runs_in_integers_as_onnxruntime_computes(tiny_bundle: Bundle, tiny: Model) -> None:
    results = compare(tiny_bundle, tiny)
    assert [one.bin for one in results] == ["bin00", "bin01"]
    assert [(one.planned, one.in_float) for one in results] == [(20, ()), (20, ())]
    for one in results:
        assert abs(one.drop_db) <= MAX_DROP_DB and one.accepted, one
        assert one.openvino_db > 25  # what 20 linears in 7 and 8 bits leave; a wrong scale leaves less than 15


def test_every_graph_of_digits_runs_in_integers_as_onnxruntime_computes(digits_bundle: Bundle, sample: Model) -> None:
    results = compare(digits_bundle, sample, calls=2)
    assert [(one.bin, one.planned, one.in_float) for one in results] == [("bin00", 48, ()), ("bin01", 48, ())]
    assert all(abs(one.drop_db) <= MAX_DROP_DB and one.accepted for one in results), results


def test_bfloat16_is_caught(digits_bundle: Bundle, sample: Model) -> None:
    """What OpenVINO does by default where the processor has it."""
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor computes in float32 whatever it is told")
    worst = max(compare(digits_bundle, sample, calls=2, settings={}), key=lambda one: one.drop_db)
    assert worst.drop_db > MAX_DROP_DB and not worst.accepted


def test_saturation_without_vnni_is_caught_and_avoided(digits_bundle: Bundle, sample: Model, folder: Path) -> None:
    """The same function in weights of twice the size, up to 126, loses more than 1 dB there; the default's nothing."""
    graph, doubled = digits_bundle.graph_path(1), folder / "doubled.onnx"
    double_weights(Graph.load(graph)).save(doubled)
    step = next(iter(sample.iter_trajectories()))[-1]
    assert digits_bundle.schedule.select(step["t"], step["branch"]) == 1
    feeds = bin_feeds(digits_bundle, 1, step)
    with torch.no_grad():
        exact = first_tensor(sample.module(**step["inputs"])).numpy()
    reference = ort.run(Graph.load(graph), feeds, options={"session.disable_quant_qdq": "1"})["sample"]
    right, wrong = (sqnr_db(exact, found) for found in run_without_vnni([graph, doubled], feeds, folder))
    assert abs(sqnr_db(exact, reference) - right) <= MAX_DROP_DB
    assert sqnr_db(exact, reference) - wrong > MAX_DROP_DB


@pytest.mark.parametrize("case", [c for c in CASES if c.lint != "openvino/saturation"], ids=lambda case: case.name)
def test_lint_says_what_openvino_then_does(case: Case, tmp_path: Path) -> None:
    path = case.save(tmp_path)
    found = lint_graphs({"graph.onnx": Graph.load(path)}, "openvino-avx512_vnni")
    assert {one.rule for one in (*found.errors, *found.warnings)} == ({case.lint} if case.lint else set())
    if case.refused:
        with pytest.raises(CompileError, match=case.refused):
            openvino_runtime.compile_graph(path)
        return
    compiled = openvino_runtime.compile_graph(path)
    assert bool(openvino_runtime.integer_layers(compiled, ["linear"])) is case.integer
    assert (sqnr_of(path, compiled) > EXACT_DB) is case.exact


def test_without_the_settings_float_inputs_are_rounded(tmp_path: Path) -> None:
    path = BY_NAME["float input, s8 weight"].save(tmp_path)
    assert sqnr_of(path, openvino_runtime.compile_graph(path)) > EXACT_DB
    if HAS_VNNI:
        assert sqnr_of(path, openvino_runtime.compile_graph(path, {})) < 60


def test_lint_predicts_saturation(tmp_path: Path) -> None:
    """Only for processors without VNNI, and there the numbers are wrong."""
    paths = [BY_NAME[name].save(tmp_path) for name in ("u8 x s8", "weights up to 127")]
    for path, rules in zip(paths, ([], ["openvino/saturation"]), strict=True):
        graph = {"graph.onnx": Graph.load(path)}
        assert [one.rule for one in lint_graphs(graph, "openvino-avx2").errors] == rules
        assert lint_graphs(graph, "openvino-avx_vnni").errors == ()
    found = run_without_vnni(paths, {"x": case_input()}, tmp_path)
    right, wrong = (sqnr_db(expected(path), one) for path, one in zip(paths, found, strict=True))
    assert right > EXACT_DB and wrong < 40


def test_onnxruntime_verifies_the_same_graphs_in_integers(tiny_bundle: Bundle) -> None:
    count, floating = count_kernels(tiny_bundle)
    assert (count.planned, count.executed, floating) == (40, 40, [])


def test_settings_travel_in_the_bundle(tiny_bundle: Bundle) -> None:
    told = json.loads((tiny_bundle.path / TARGET.HANDOFF).read_text(encoding="utf-8"))
    assert told["settings"] == openvino_runtime.SETTINGS
    assert told["graphs"] == ["graphs/body.bin00.onnx", "graphs/body.bin01.onnx"]
    for graph in told["graphs"]:
        openvino_runtime.compile_graph(tiny_bundle.path / graph, told["settings"])


def documented(folder: Path, **settings: Any) -> Any:
    """The host of docs/handoff-openvino.md, as printed, on a bundle."""
    text = (Path(__file__).parents[1] / "docs" / "handoff-openvino.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    return names["Transformer"](folder, **settings)


def test_the_documented_code_runs_the_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The right graph at each timestep, two held, compiled ones cached."""
    transformer = documented(tiny_bundle.path, cache=tmp_path)
    for t in (1000.0, 800.0, 120.0, 20.0, 1000.0):
        inputs = {name: one.numpy() for name, one in tiny_model.inputs(11, t).items()}
        index = tiny_bundle.schedule.select(t)
        feeds = bin_feeds(tiny_bundle, index, {"t": t, "branch": "cond", "inputs": tiny_model.inputs(11, t)})
        exact = openvino_runtime.run(openvino_runtime.compile_graph(tiny_bundle.graph_path(index)), feeds, "sample")
        np.testing.assert_array_equal(transformer(t, **inputs), exact)
    assert len(transformer.compiled) == 2
    assert list(tmp_path.iterdir())
    edge = tiny_bundle.schedule.bins[0].when.t[0]
    assert [transformer._bin(t) for t in (2000.0, edge, np.nextafter(edge, 0), -1.0)] == [0, 0, 1, 1]


def test_the_documented_code_runs_what_left_the_graphs(tmp_path: Path) -> None:
    """Prompts once, rows of tables, the step graph for other timesteps, values of both; of two experts."""
    made = hoisted_bundle.write(tmp_path / "parts")
    (made.path / "handoff").mkdir()
    told = {"settings": openvino_runtime.SETTINGS}
    (made.path / "handoff/openvino.json").write_text(json.dumps(told), encoding="utf-8")
    transformer, given = documented(made.path), [hoisted_bundle.inputs(seed=seed) for seed in range(2)]
    with load(made.path, threads=1) as runtime:
        for t in (1000.0, 875.0, 640.0, 375.0, 33.0):
            for inputs in given:
                found = transformer(t, timestep=np.array([t], np.float32), **inputs)
                np.testing.assert_allclose(found, runtime(timestep=t, **inputs).sample, rtol=1e-5, atol=1e-5)
    assert len(transformer.prompts) == 4
    assert set(transformer.ahead) == {path for one in made.schedule.hoisted for path in one.graphs}


def test_sixteen_bits_are_refused(tiny: Model, traced: Graph, folder: Path) -> None:
    recipe = load_recipe("static-minmax")
    wide = replace(recipe, name="wide", activations=replace(recipe.activations, bits=16))
    with pytest.raises(RecipeError, match=r"16-bit activations.*4, 6, 8"):
        export(tiny, target="openvino", recipe=wide, out=folder / "wide", traced={"": traced.copy()})
    assert not (folder / "wide").exists()


def test_weights_stay_within_63_unless_the_processor_is_named() -> None:
    assert {isa: TARGET.spec(isa).weight_qmax[8] for isa in TARGET.spec().isas} == {
        "avx2": 63, "avx_vnni": 127, "avx512_vnni": 127, "npu": 127
    }  # fmt: skip
    assert TARGET.spec().isa == "avx2"
    with pytest.raises(UnknownNameError, match="avx_vnni"):
        TARGET.spec("vnni")


def test_weights_of_the_default_are_within_63(tiny_bundle: Bundle) -> None:
    graph = Graph.load(tiny_bundle.graph_path(0))
    weights = [t.values for t in graph.constants() if t.name.endswith(".weight.int8")]
    assert len(weights) == 20
    assert max(int(np.abs(w.astype(np.int16)).max()) for w in weights) == 63


def test_without_openvino_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingToolError, match=r"pip install 'vdq-export\[openvino\]'"):
        openvino_runtime.compile_graph(tmp_path / "graph.onnx")
