"""quantize_weights and qdq in every form: outputs against numpy from the definitions, within rounding of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.quant_cases import NAMES, OUTPUTS, Case
from vdq_export import ort, pipeline, targets
from vdq_export.errors import PlanError
from vdq_export.graph import Graph
from vdq_export.plan import WeightPlan
from vdq_export.target_spec import TargetSpec

ORT, REFERENCE = (targets.load(name).spec() for name in ("ort-int8", "reference"))
ACTIVATIONS = [("uint8", 4), ("uint8", 6), ("uint8", 8), ("uint16", 16)]
INT8, INT4 = WeightPlan(dtype="int8", qmax=63, why=""), WeightPlan(dtype="int4", qmax=7, bits=4, why="")
WEIGHTS = {
    "int8": INT8,
    "int6 in int8": WeightPlan(dtype="int8", qmax=31, bits=6, why=""),
    "int4 in int8": WeightPlan(dtype="int8", qmax=7, bits=4, why=""),
    "int4": INT4,
    "int16": WeightPlan(dtype="int16", qmax=32767, bits=16, why=""),
    "groups of 32": WeightPlan(dtype="int8", qmax=7, bits=4, group=32, why=""),
    "int4 groups of 64": replace(INT4, group=64),
    "mxfp4": WeightPlan(dtype="int8", qmax=12, bits=4, group=32, grid="e2m1", scales="e8m0", codes=True, why=""),
}


def errors(case: Case, graph: Graph, integer: bool, spec: TargetSpec = ORT) -> dict[str, float]:
    """Largest error of each output, in tolerances: above 1 is wrong."""
    got, x_hat = case.run(graph, spec), case.x_hat()
    expected = case.expected(x_hat)
    return {
        name: float((np.abs(got[out] - expected[out]) / case.tolerance(x_hat, name, integer)).max())
        for name, out in OUTPUTS.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(WEIGHTS)),
    activation=st.sampled_from(ACTIVATIONS),
    spec=st.sampled_from([ORT, REFERENCE]),
    leading=st.sampled_from([(1,), (7,), (2, 5), (1, 3, 2), (2, 1, 2, 3)]),
    k=st.sampled_from([64, 128]),
    columns=st.sampled_from([1, 2, 7, 33]),
    codes=st.booleans(),
    delta=st.sampled_from([None, 0.1]),
    seed=st.integers(0, 99),
)
def test_outputs_are_the_definitions(
    kind: str, activation: Any, spec: Any, leading: Any, k: int, columns: int, codes: bool, delta: Any, seed: int
) -> None:
    plan = WEIGHTS[kind]
    case = Case(replace(plan, codes=codes or plan.codes), activation, (*leading, k), columns, seed=seed, delta=delta)
    integer = (activation[0], plan.dtype) in spec.integer and not plan.group
    graph = case.quantized(spec)
    graph.check()
    onnx.checker.check_model(graph.to_proto(), full_check=True)
    assert ("Gemm" in {node.op for node in graph.nodes}) == integer
    clips = sum(node.op == "Clip" for node in graph.nodes)
    assert clips == (activation[1] in (4, 6) or delta is not None), "one for both linears, where it is needed"
    found = errors(case, graph, integer, spec)
    assert max(found.values()) <= 1, found


@pytest.mark.parametrize("leading", [(1,), (4,), (2, 3)])
@pytest.mark.parametrize("k", [1, 3, 7, 97])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_odd_widths(activation: Any, k: int, leading: tuple[int, ...]) -> None:
    for spec, integer in ((ORT, activation[0] == "uint8"), (REFERENCE, False)):
        case = Case(INT8, activation, (*leading, k), 5, seed=k)
        found = errors(case, case.quantized(spec), integer, spec)
        assert max(found.values()) <= 1, found


@pytest.mark.parametrize("bits", [4, 6])
def test_fewer_bits_are_clamped_exactly_at_every_level(bits: int) -> None:
    """Every level, every midpoint and far beyond either end, for scales that are no powers of two."""
    for seed in range(20):
        case = Case(INT8, ("uint8", bits), (200, 1), 1, seed=seed)
        low = -case.range.zero_point
        steps = np.concatenate([np.arange(low - 8, low + 2**bits + 8, 0.5), [-1e6, 1e6]])
        case.x[:] = np.resize(steps * case.range.scale, 200)[:, None].astype(np.float32)
        x = ort.run(case.quantized(ORT), {"in": case.x}, ["x/Dequantize"])["x/Dequantize"]
        np.testing.assert_array_equal(x, case.x_hat().astype(np.float32).reshape(x.shape))
        assert len(np.unique(x)) == 2**bits


def test_without_the_clip_there_would_be_more_levels() -> None:
    case = Case(INT8, ("uint8", 4), seed=3)
    graph = case.quantized(ORT)
    quantize = next(node for node in graph.nodes if node.op == "QuantizeLinear")
    quantize.inputs[0] = quantize.inputs[0].inputs[0].inputs[0]
    assert max(errors(case, graph, True).values()) > 100


def test_int4_survives_a_bundle_file(tmp_path: Path) -> None:
    """Inline and in external data, odd sizes included: the same integers and the same output."""
    for columns, k in ((7, 5), (7, 1000)):
        case = Case(replace(INT4, codes=True), shape=(3, k), columns=columns)
        graph = case.quantized(REFERENCE)
        onnx.save_model(graph.to_proto(), tmp_path / "g.onnx", save_as_external_data=True, size_threshold=100)
        again = Graph.load(tmp_path / "g.onnx")
        for name in NAMES:
            stored = {c.name: c.values for c in again.constants()}[f"{name}.weight.int4"]
            np.testing.assert_array_equal(stored.astype(np.int8), case.codes[name])
        assert again.hash() == graph.hash()
        found = ort.run(again, {"in": case.x})
        for out, values in ort.run(graph, {"in": case.x}).items():
            np.testing.assert_array_equal(found[out], values)


@pytest.mark.parametrize("fault", ["swapped scale", "shifted group", "wrong highest", "wrong lowest", "one code"])
@pytest.mark.parametrize("name", ["ort-int8", "reference"])
def test_planted_faults_are_caught(name: str, fault: str) -> None:
    spec = targets.load(name).spec()
    case = Case(WEIGHTS["groups of 32"] if fault == "shifted group" else INT8, ("uint8", 4), seed=1)
    graph = case.quantized(spec)
    integer = name == "ort-int8" and fault != "shifted group"
    assert max(errors(case, graph, integer, spec).values()) <= 1
    constants = {c.name: c for c in graph.constants()}
    scale, step = constants["second.weight.scale"], np.float32(case.range.scale)
    if fault == "swapped scale":
        scale.values = scale.values[::-1].copy()
    elif fault == "shifted group":
        scale.values = np.roll(scale.values, 1, axis=0)
    elif fault == "one code":
        codes = constants["second.weight.int8"]
        codes.values = codes.values + np.eye(*codes.values.shape, dtype=np.int8)
    else:
        bound = constants[f"x.{fault.removeprefix('wrong ')}"]
        bound.values = bound.values + step  # below the lowest level the type itself saturates
    assert max(errors(case, graph, integer, spec).values()) > 100


def test_a_matmul_without_a_bias_gets_one() -> None:
    """onnxruntime 1.31 takes a bare MatMul over block scales for an integer kernel, which then fails."""
    case = Case(WEIGHTS["groups of 32"])
    graph = case.quantized(REFERENCE)
    add = next(node for node in graph.nodes if node.op == "Add" and "second" in node.name)
    assert not add.inputs[1].values.any()
    bare = add.inputs[0]
    bare.name, add.outputs[0].name = add.outputs[0].name, "unused"
    graph.gs.outputs[1] = bare
    graph.cleanup()
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        ort.run(graph, {"in": case.x})


def test_integer_layers_are_those_with_a_kernel(tmp_path: Path) -> None:
    target = targets.load("ort-int8")
    for kind, activation, planned in (
        ("int8", ("uint8", 8), 2), ("int4 in int8", ("uint8", 4), 2), ("int8", ("uint16", 16), 0),
        ("int16", ("uint8", 8), 0), ("groups of 32", ("uint8", 8), 0),
    ):  # fmt: skip
        case, path = Case(WEIGHTS[kind], activation), tmp_path / "optimised.onnx"
        ort.session(case.quantized(ORT), optimised_path=str(path))
        found = target.integer_layers(path, case.plan)
        assert (len(found), all(found.values())) == (planned, True), (kind, activation)
        assert targets.load("reference").integer_layers(path, case.plan) == {}


def test_two_precisions_differ_in_small_constants_only() -> None:
    """4 and 8 bits of a delta schedule: the same nodes, names and shapes, so that one session serves both."""
    low, high = (Case(INT8, ("uint8", bits), delta=0.1) for bits in (4, 8))
    first, second = (case.quantized(ORT) for case in (low, high))
    assert [(n.op, n.name) for n in first.nodes] == [(n.op, n.name) for n in second.nodes]
    theirs = {c.name: c.values for c in second.constants()}
    different = {c.name for c in first.constants() if not np.array_equal(c.values, theirs[c.name])}
    assert different and all(theirs[name].ndim < 2 for name in different)


@pytest.mark.parametrize(
    ("what", "message"),
    [("missing", "needs codes of shape .64, 6., the plan has none"), ("shape", "the plan has .6, 64."),
     ("grid", "a weight of 64 outside its grid of ±63"), ("scale", "needs scale of shape .2, 6., the plan has none")],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(what: str, message: str) -> None:
    case = Case(WEIGHTS["groups of 32"] if what == "scale" else replace(INT8, codes=True))
    tensors = {} if what in ("missing", "scale") else dict(case.tensors)
    if what == "shape":
        tensors["first#codes"] = tensors["first#codes"].T
    if what == "grid":
        tensors["first#codes"] = np.full_like(tensors["first#codes"], 64)
    context = case.context(REFERENCE)
    context = type(context)(context.plan, context.bin, context.spec, tensors)
    with pytest.raises(PlanError, match=message):
        pipeline.run_passes(case.graph, ["quantize_weights"], context)
