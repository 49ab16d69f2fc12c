"""Target tensorrt: every format gives the numbers of its definition, in onnxruntime and in onnx's reference evaluator.

TensorRT itself runs nowhere here: what it would say is asked of its published rules, as a lint table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from tests import tensorrt_cases as cases
from tests import tiny_model
from tests.bin_feeds import bin_feeds
from vdq_export import ort, targets
from vdq_export.calib import dynamic, formats, weight_ranges
from vdq_export.calib.ranges import Grid, affine, fake_quantize
from vdq_export.compiler import export
from vdq_export.errors import PassError, RecipeError
from vdq_export.graph import Array, Graph
from vdq_export.handoff.trt_functions import FP4, MXFP8
from vdq_export.lint.engine import lint_graphs
from vdq_export.lint.table import for_profile
from vdq_export.metrics import decibels
from vdq_export.model import Model
from vdq_export.plan import Dynamic
from vdq_export.recipe import Recipe, load
from vdq_export.runtime import load as load_runtime
from vdq_export.targets._tensorrt_types import four_bits, half
from vdq_export.weights import number_grid

SPEC = targets.load("tensorrt").spec()
OPTIONS = targets.load("tensorrt").session_options(SPEC)


def checked(graph: Graph) -> onnx.ModelProto:
    """What a strongly typed consumer needs: valid operators, and every type and shape following from the inputs'."""
    proto = graph.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return proto


def error_db(exact: Array, found: Array) -> float:
    difference = np.asarray(found, np.float64) - exact
    return decibels(float(np.square(exact, dtype=np.float64).sum()), float(np.square(difference).sum()))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.FORMATS)
def test_a_format_gives_what_its_definition_says(name: str) -> None:
    """Against float64 arithmetic on numbers that ml_dtypes rounded; the reference evaluator says the same."""
    for seed in range(3):
        made = cases.case(name, seed)
        graph = made.quantized(SPEC)
        x_hat = cases.x_hat(name, made)
        proto = checked(graph)
        ours = ort.run(graph, {"in": made.x}, options=OPTIONS)
        reference = dict(zip(ours, ReferenceEvaluator(proto).run(list(ours), {"in": made.x}), strict=True))
        for output, wanted in made.expected(x_hat).items():
            layer = "first" if output.startswith("first") else "second"
            allowed = made.tolerance(x_hat, layer, integer=False) + 1e-9
            assert (np.abs(ours[output] - wanted) <= allowed).all()
            assert (np.abs(reference[output] - wanted) <= allowed).all()


def test_a_planted_rounding_fault_is_noticed() -> None:
    """One activation moved by a level, the least that can go wrong, is far outside the tolerance above."""
    made = cases.case("fp8")
    x_hat = cases.x_hat("fp8", made)
    wrong = x_hat.copy()
    wrong[0, 0, 0] += made.range.scale
    graph = made.quantized(SPEC)
    ours = ort.run(graph, {"in": made.x}, options=OPTIONS)["second/MatMul"]
    allowed = made.tolerance(x_hat, "second", integer=False) + 1e-9
    assert not (np.abs(ours - made.expected(wrong)["second/MatMul"]) <= allowed).all()


@pytest.mark.parametrize("name", cases.FORMATS)
def test_solver_and_graph_quantize_activations_alike(name: str) -> None:
    """What calibration assumes an activation becomes is what the graph makes of it, to the bit."""
    made = cases.case(name)
    if name == "int4":
        assert not [n for n in made.quantized(SPEC).nodes if n.op == "QuantizeLinear"]
        return
    graph = made.quantized(SPEC)
    inner = next(n for n in graph.nodes if n.name == "second/MatMul").inputs[0].name
    found = ort.run(graph, {"in": made.x}, [inner], options=OPTIONS)[inner]
    grid = Grid(made.activation[0], made.activation[1], symmetric=True)  # type: ignore[arg-type]
    rows = dynamic.quantize_rows(made.x.reshape(-1, 64), made.dynamic or made.range, grid)
    assert np.array_equal(found.reshape(-1, 64), rows)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=40))
def test_e4m3_and_e2m1_rounding_is_ml_dtypes(values: list[float]) -> None:
    x = np.array(values, np.float32)
    wide = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(number_grid.nearest(x.copy(), 448, "e4m3"), wide)
    small = np.clip(x / 64, -6, 6)
    twice = number_grid.nearest(2 * small, number_grid.E2M1_QMAX, "e2m1")
    assert np.array_equal(twice / 2, small.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-30, 1e30), st.integers(0, 2**31))
def test_two_level_scales(peak: float, seed: int) -> None:
    """A scale is an E4M3 number times the unit, exactly; none overflows, and no weight is further off than half a step
    of its block plus what rounding the scale itself costs."""
    rng = np.random.default_rng(seed)
    weight = (rng.uniform(-1, 1, (64, 3)) * peak).astype(np.float32)
    fmt = weight_ranges.fitted(weight, formats.FLOATING["nvfp4"])
    scale = weight_ranges.scales(weight, fmt)
    levels = scale.astype(np.float64) / fmt.unit
    assert np.array_equal(levels, levels.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    assert levels.max() <= 448
    blocks = np.abs(weight.reshape(-1, 16, 3)).max(axis=1)
    restored = weight_ranges.dequantize(weight_ranges.quantize(weight, scale, fmt), scale, fmt)
    # The widest step is 2 of 6; a scale rounded down by 1/16, or by half the least E4M3 number, cuts that off the top.
    allowed = blocks * (1 / 6 + 1 / 16) + 6 * 2.0**-9 * 2 * fmt.unit
    assert (np.abs(restored - weight).reshape(-1, 16, 3).max(axis=1) <= allowed).all()


@pytest.mark.parametrize("exponent", [-100, -3, 0, 1, 60])
def test_mxfp8_scales_at_powers_of_two(exponent: int) -> None:
    """448·2^e is the last magnitude under the exponent e, the next float32 the first under e + 1; log2 is inexact."""
    top = np.float32(448 * 2.0**exponent)
    x = np.zeros((1, 2, 32), np.float32)
    x[0, 0, 3], x[0, 1, 3] = top, np.nextafter(top, np.float32(np.inf))
    graph = cases.dynamic(MXFP8, 32, (1, 2, 32))
    _, scale = ReferenceEvaluator(graph.to_proto()).run(["q", "s"], {"x": x})
    assert scale.reshape(-1).tolist() == [127 + exponent, 128 + exponent]
    assert ort.run(graph, {"x": x}, ["s"])["s"].reshape(-1).tolist() == [127 + exponent, 128 + exponent]


def test_blocks_of_zeros_stay_zero() -> None:
    for how in (Dynamic(kind="nvfp4", why="", unit=1e-3), Dynamic(kind="mxfp8", why="")):
        assert not dynamic.quantize_rows(np.zeros((2, 64), np.float32), how, Grid("float8e4m3fn", 8)).any()
    for op, block in ((FP4, 16), (MXFP8, 32)):
        graph = cases.dynamic(op, block, (1, 2, 64))
        assert not ort.run(graph, {"x": np.zeros((1, 2, 64), np.float32)})["y"].any()


@settings(max_examples=100, deadline=None)
@given(st.floats(-1e4, 0), st.floats(0, 1e4), st.sampled_from(["int8", "float8e4m3fn"]))
def test_symmetric_ranges(lo: float, hi: float, dtype: Any) -> None:
    grid = Grid(dtype, 8, symmetric=True)
    scale, zero = affine(lo, hi, grid)
    assert zero == 0 and scale > 0
    ends = np.array([lo, hi], np.float32)
    step = scale * (1 if dtype == "int8" else 32)  # E4M3's widest step
    assert (np.abs(fake_quantize(ends, scale, zero, grid) - ends) <= 0.51 * step).all()


# -- what is handed over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", cases.FORMATS)
def test_handed_over_types(name: str, isa: str) -> None:
    """Valid and typed throughout; as far from the float product as the verified graph is, plus what 16 bits cost."""
    made = cases.case(name)
    verified = made.quantized(SPEC)
    graph = verified.copy()
    assert isa == "fp32" or half(graph, isa) > 0
    assert bool(four_bits(graph)) == (name == "nvfp4")
    proto = checked(graph)
    kinds = {t.data_type for t in proto.graph.initializer}
    assert (onnx.TensorProto.FLOAT4E2M1 in kinds) == (name == "nvfp4")
    assert lint_graphs({"g": graph}, "tensorrt").findings == ()
    found = ReferenceEvaluator(proto).run(["second/MatMul"], {"in": made.x})[0]
    exact = made.x.astype(np.float64) @ made.w_hat("second")
    before = ort.run(verified, {"in": made.x}, options=OPTIONS)["second/MatMul"]
    if isa == "fp32":
        assert np.allclose(found, before, rtol=0, atol=1e-5 * np.abs(before).max())  # no number changed
        return
    # Rounding x, the scale and the product to p bits costs about p·6 dB; noise powers add up. A quantizer turns some of
    # it into whole levels, on both sides: twice the power.
    limit = {"fp16": 60.0, "bf16": 42.0}[isa]
    noise = 2 * (10 ** (-error_db(exact, before) / 10)) + 10 ** (-limit / 10)
    assert error_db(exact, found) >= -10 * np.log10(noise)


def test_halves_leave_wide_what_needs_it() -> None:
    """A square of 300 and the fraction of a timestep of 999.5 do not survive FP16."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[2, 64] x, float[1] t) => (float[2, 64] y, float[1] s)
    <float[1] f = {1.0}, float two = {2.0}, float eps = {0.000001}>
    {
       a = Mul (t, f)
       s = Sin (a)
       square = Pow (x, two)
       mean = ReduceMean (square)
       plus = Add (mean, eps)
       root = Sqrt (plus)
       n = Div (x, root)
       y = MatMul (n, w)
    }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    for node in proto.graph.node:
        node.name = node.output[0]
    graph = Graph.from_proto(onnx.shape_inference.infer_shapes(proto))
    x = np.full((2, 64), 300, np.float32)
    feeds = {"x": x, "t": np.array([999.75], np.float32)}
    assert half(graph, "fp16") == 1  # the product alone
    found = ort.run(graph, feeds)
    assert np.allclose(found["y"], 1, atol=1e-3) and np.allclose(found["s"], np.sin(999.75), atol=1e-6)
    assert {v.name: v.dtype for v in graph.gs.outputs} == {"y": np.float32, "s": np.float32}


def test_a_scale_that_halves_cannot_hold_is_an_error() -> None:
    made = cases.case("int8")
    graph = made.quantized(SPEC)
    next(c for c in graph.constants() if c.name == "x.scale").values = np.array(3e-8, np.float32)
    with pytest.raises(PassError, match=r"x\.scale: a scale that float16 cannot hold"):
        half(graph, "fp16")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record") / "record.safetensors"


@pytest.mark.parametrize(("recipe", "isa"), [("static-minmax", "fp16"), ("static-fp8", "bf16")])
def test_export(recipe: str, isa: str, tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
    bundle = export(
        tiny, recipe=recipe, target="tensorrt", isa=isa, tsw=2, out=tmp_path / "b", traced={"": traced.copy()},
        workers=1, strict=True, **known,
    )  # fmt: skip  # strict: the lint of handoff/ has no error
    steps = [s for s in tiny_model.trajectory(3) if bundle.schedule.select(s["t"], s["branch"]) == 0]
    handed = bundle.path / "handoff" / "tensorrt"
    files = sorted(path.name for path in handed.glob("*.onnx"))
    assert files == ["body.bin00.onnx", "body.bin01.onnx"]
    assert [f"--onnx={name} " in (handed / "build.sh").read_text(encoding="utf-8") for name in files] == [True, True]
    onnx.checker.check_model(handed / files[0], full_check=True)
    verified, given_over = Graph.load(bundle.graph_path(0)), Graph.load(handed / files[0])
    assert {n.inputs[0].dtype for n in given_over.nodes if n.op == "QuantizeLinear"} <= {
        np.dtype("float16"), number_grid.numpy_type("bfloat16"), onnx.TensorProto.BFLOAT16,
    }  # fmt: skip
    for step in steps[:2]:
        feeds = bin_feeds(bundle, 0, step)
        exact = tiny(**step["inputs"]).numpy()
        found = next(iter(ort.run(verified, feeds, options=OPTIONS).values()))
        assert error_db(exact, found) > 25
        if isa == "fp16":
            found = next(iter(ort.run(given_over, feeds, options=OPTIONS).values()))
        else:  # onnxruntime's CPU provider has no BF16
            found = ReferenceEvaluator(checked(given_over)).run(None, feeds)[0]
        assert error_db(exact, found) > {"fp16": 25, "bf16": 20}[isa]
    with load_runtime(bundle.path, threads=1) as transformer:  # bins share a session: their scales are fed
        for step in tiny_model.trajectory(3)[:4]:
            with transformer.cache_context(step["branch"]):
                found = transformer(**step["inputs"]).sample.numpy()
            assert error_db(tiny(**step["inputs"]).numpy(), found) > 25


# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", cases.PLANTED)
def test_a_broken_rule_is_found(planted: str) -> None:
    rule, make = cases.PLANTED[planted]
    found = lint_graphs({"g": make()}, "tensorrt").findings
    assert f"tensorrt/{rule}" in [one.rule for one in found]


@pytest.mark.parametrize("clean", cases.CLEAN)
def test_published_forms_pass(clean: str) -> None:
    assert lint_graphs({"g": cases.CLEAN[clean]()}, "tensorrt").findings == ()


def test_every_rule_is_planted_and_says_its_source() -> None:
    table = for_profile("tensorrt")
    assert {rule.id for rule in table.rule} == {f"tensorrt/{rule}" for rule, _ in cases.PLANTED.values()}
    assert all(rule.source and rule.fix for rule in table.rule)


REFUSED = {
    "wan22-mxfp4": "MXFP4 weights: TensorRT's documentation has no MXFP4",
    "q-dit": "offers",  # 4-bit weights beside 8-bit activations
    "svdquant": "4-bit activations",
}


@pytest.mark.parametrize("name", REFUSED)
def test_recipes_it_has_no_kernels_for(name: str, tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
    with pytest.raises(RecipeError) as error:
        export(tiny, recipe=name, target="tensorrt", out=tmp_path / "b", traced={"": traced.copy()}, workers=1, **known)
    assert REFUSED[name] in f"{error.value.what} {error.value.hint}"


def test_formats_say_what_does_not_fit() -> None:
    def recipe(**changes: Any) -> Recipe:
        return load("nvfp4") if not changes else Recipe(name="r", summary="s", **changes)

    from vdq_export.recipe import ActivationRecipe, WeightRecipe

    wrong = recipe(weights=WeightRecipe(grid="fp8", bits=4), activations=ActivationRecipe(grid="fp8"))
    with pytest.raises(RecipeError, match="FP8 weights have 8 bits, not 4"):
        formats.check(wrong, SPEC)
    narrow = recipe(weights=WeightRecipe(bits=4, group=32), activations=ActivationRecipe(grid="float", bits=16))
    with pytest.raises(RecipeError, match="weight groups of 32"):
        formats.check(narrow, SPEC)
    static = targets.load("ort-int8").spec("avx2")
    with pytest.raises(RecipeError, match="NVFP4 activations, computed at run time"):
        formats.check(load("nvfp4"), static)
