"""dynamic_quantize: what the graph computes at run time is the definition, to the bit, and what the solver assumed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quant_cases import NAMES, OUTPUTS, Case
from vdq_export import ort, pipeline, targets
from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.ranges import Grid
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph
from vdq_export.plan import Dynamic, WeightPlan

REFERENCE = targets.load("reference").spec()
INT8 = WeightPlan(dtype="int8", qmax=127, why="")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]  # even places: even mantissa


def dynamic(kind: Any, ratio: float = 1.0, offset: int = 0) -> Dynamic:
    return Dynamic(kind=kind, why="", ratio=ratio, offset=offset)


def x_hat(case: Case, graph: Graph | None = None) -> Array:
    """The quantized value inside the graph."""
    return case.run(graph or case.quantized(REFERENCE), REFERENCE, ["x/Dynamic"])["x/Dynamic"]


def affine(values: Array, bits: int, ratio: float) -> Array:
    """One row, or one channel of a sample, by the definition; every step in float32."""
    one, levels = np.float32, 2**bits - 1
    lo = one(min(values.min(), 0)) * one(ratio)
    hi = one(max(values.max(), 0)) * one(ratio)
    step = (hi - lo) / one(levels)
    if step < np.finfo(one).tiny:
        return np.zeros_like(values)
    z = round(float(-lo / step))
    q = np.array([min(max(round(float(v / step)) + z, 0), levels) for v in values], one)
    return np.asarray((q - one(z)) * step)


def mx(block: Array, ratio: float, offset: int) -> Array:
    """32 channels by the definition: the nearest of the sixteen elements, ties to the even mantissa."""
    peak = float(np.float32(np.abs(block).max()) * np.float32(ratio))
    exponent = math.frexp(peak)[1] - 1 - 2 + offset if peak else -125
    unit = math.ldexp(1.0, min(max(exponent, -125), 127))
    found = []
    for v in block.astype(float):
        size = min(E2M1, key=lambda e: (abs(abs(v) / unit - e), E2M1.index(e) % 2))
        found.append(math.copysign(size, v) * unit)
    return np.array(found, np.float32)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["token", "channel"]),
    bits=st.sampled_from([4, 6, 8]),
    shape=st.sampled_from([(3, 5), (2, 4, 3), (2, 2, 3, 7), (1, 1), (2, 1, 1)]),
    ratio=st.sampled_from([1.0, 0.8, 0.6]),
    power=st.integers(-30, 30),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 99),
)
def test_affine_kinds_are_the_definition(
    kind: str, bits: int, shape: Any, ratio: float, power: int, shift: float, seed: int
) -> None:
    case = Case(INT8, ("uint8", bits), shape, dynamic=dynamic(kind, ratio), seed=seed)
    case.x = np.ldexp(case.x + np.float32(shift), power)
    case.x.reshape(-1, shape[-1])[0] = 0  # an empty row
    samples = case.x.reshape(1, -1, shape[-1]) if len(shape) == 2 else case.x.reshape(shape[0], -1, shape[-1])
    axis = 2 if kind == "token" else 1
    expected = np.apply_along_axis(affine, axis, samples, bits, ratio)
    np.testing.assert_array_equal(x_hat(case).reshape(samples.shape), expected)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(3, 32), (2, 3, 64), (1, 2, 2, 96)]),
    ratio=st.sampled_from([1.0, 0.9, 0.6]),
    offset=st.integers(-1, 1),
    power=st.integers(-60, 60),
    seed=st.integers(0, 99),
)
def test_mx_is_the_definition(shape: Any, ratio: float, offset: int, power: int, seed: int) -> None:
    case = Case(INT8, ("uint8", 4), shape, dynamic=dynamic("mx", ratio, offset), seed=seed)
    case.x = np.ldexp(case.x, power)
    case.x.reshape(-1, 32)[0] = 0
    expected = np.stack([mx(block, ratio, offset) for block in case.x.reshape(-1, 32)])
    np.testing.assert_array_equal(x_hat(case).reshape(-1, 32), expected)


def test_mx_at_every_power_of_two_and_beside_it() -> None:
    """Where log₂ is wrong in its last bit the floor would be; and all ties and ends of the elements."""
    powers = np.ldexp(np.float32(1), np.arange(-126, 128)).astype(np.float32)
    below, above = np.nextafter(powers, np.float32(0)), np.nextafter(powers[:-1], np.float32(np.inf))
    peaks = np.concatenate([powers, below[1:], above])
    case = Case(INT8, ("uint8", 4), (len(peaks), 32), dynamic=dynamic("mx"))
    parts = np.array([1, 0.875, 0.625, 0.4375, 0.3125, 0.1875, 0.0625, 0.03], np.float32)
    case.x = peaks[:, None] * np.tile(np.concatenate([parts, -parts]), 2)
    expected = np.stack([mx(block, 1.0, 0) for block in case.x])
    np.testing.assert_array_equal(x_hat(case), expected)


@pytest.mark.parametrize("kind", ["token", "channel", "mx"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_solver_sees_what_the_graph_does(kind: str, bits: int) -> None:
    for seed in range(5):
        how = dynamic(kind, 0.9, 1 if kind == "mx" else 0)
        case = Case(INT8, ("uint8", bits), (1, 40, 64), dynamic=how, seed=seed)
        np.testing.assert_array_equal(x_hat(case)[0], quantize_rows(case.x[0], how, Grid("uint8", bits)))


@pytest.mark.parametrize("kind", ["token", "channel", "mx"])
def test_outputs_follow_and_linears_share_the_value(kind: str) -> None:
    case = Case(INT8, ("uint8", 8), (2, 5, 64), dynamic=dynamic(kind))
    graph = case.quantized(REFERENCE)
    readers = [node for node in graph.nodes if node.op == "MatMul"]
    assert len(readers) == 2 and readers[0].inputs[0] is readers[1].inputs[0]
    value = x_hat(case, graph).astype(np.float64)
    expected, got = case.expected(value), case.run(graph, REFERENCE)
    # Without the target's session options onnxruntime 1.31 rounds x̂ to 8 bits once more, in MatMulNBits.
    careless = ort.run(graph, {"in": case.x})
    for name, out in OUTPUTS.items():
        allowed = case.tolerance(value, name, integer=False)
        assert (np.abs(got[out] - expected[out]) <= allowed).all()
        assert (np.abs(careless[out] - expected[out]) > 10 * allowed).any()


@pytest.mark.parametrize("kind", ["token", "channel", "mx"])
def test_bins_differ_in_numbers_only_and_a_second_run_does_nothing(kind: str) -> None:
    one, other = (Case(INT8, dynamic=dynamic(kind, r, o)).quantized(REFERENCE) for r, o in ((1.0, 0), (0.7, -1)))
    assert [(n.op, n.name) for n in one.nodes] == [(n.op, n.name) for n in other.nodes]
    case = Case(INT8, dynamic=dynamic(kind))
    before = one.hash()
    reports = pipeline.run_passes(one, ("quantize_weights", *pipeline.PER_BIN), case.context(REFERENCE))
    assert [r.applied for r in reports] == [0] * len(reports)
    assert one.hash() == before


@pytest.mark.parametrize("fault", ["no ratio", "levels", "offset", "floor"])
def test_planted_faults_are_seen(fault: str) -> None:
    kind = "mx" if fault in ("offset", "floor") else "token"
    case = Case(INT8, ("uint8", 8), (4, 64), dynamic=dynamic(kind, 0.7))
    if fault == "floor":
        case.x[:, 0], case.x[:, 32] = 8 / 0.7, 8 / 0.7  # just above or below a power of two once multiplied
    right, graph = x_hat(case), case.quantized(REFERENCE)
    constants = {c.name: c for c in graph.constants()}
    name, value = {
        "no ratio": ("x.ratio", 1.0), "levels": ("x.levels", 256), "offset": ("x.offset", 0.5),
        "floor": ("x.log2", np.log(2) * 0.4),
    }[fault]  # fmt: skip
    constants[name].values = np.array(value, np.float32)
    assert not np.array_equal(x_hat(case, graph), right)


def test_refused_where_nothing_is_computed_at_run_time() -> None:
    case = Case(INT8, dynamic=dynamic("token"))
    with pytest.raises(PlanError, match="statistics at run time"):
        case.quantized(targets.load("ort-int8").spec())
    odd = Case(INT8, shape=(3, 33), dynamic=dynamic("mx"))
    with pytest.raises(PlanError, match=f"layer {NAMES[0]}: 33 channels in blocks of 32"):
        odd.quantized(REFERENCE)
