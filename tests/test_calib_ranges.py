"""Ranges: every grid holds zero, covers its data, and rounds by half a step at most."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tests import calib_cases as cases
from vdq_export import hadamard
from vdq_export.calib.ranges import Grid, activation_range, affine, fake_quantize
from vdq_export.plan import INT_RANGE
from vdq_export.recipe import ActivationRecipe

GRIDS = [Grid("uint8", 8), Grid("int8", 8), Grid("uint4", 4), Grid("uint16", 16), Grid("int16", 16), Grid("uint8", 6)]
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FLOATS)


@settings(deadline=None)
@given(lo=FLOATS, hi=FLOATS, grid=st.sampled_from(GRIDS))
def test_affine_holds_zero_and_covers_the_range(lo: float, hi: float, grid: Grid) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    scale, zero = affine(lo, hi, grid)
    qmin, qmax = INT_RANGE[grid.dtype]
    assert scale > 0 and np.isfinite(scale) and scale == float(np.float32(scale))
    assert qmin <= zero <= grid.qmin + grid.levels <= qmax, "real zero is one of the integers"
    # rounding the zero point moves the covered range by half a step at most; 1e-3 of a step for the float32 scale
    slack = 0.501 * scale
    assert scale * (grid.qmin - zero) <= min(lo, 0) + slack
    assert scale * (grid.qmin + grid.levels - zero) >= max(hi, 0) - slack - 1e-7 * grid.levels * scale


@settings(deadline=None)
@given(x=MATRICES, grid=st.sampled_from(GRIDS))
def test_error_inside_the_range_is_half_a_step_at_most(x: np.ndarray[Any, Any], grid: Grid) -> None:
    scale, zero = affine(float(x.min()), float(x.max()), grid)
    wide = x.astype(np.float64)
    error = np.abs(fake_quantize(wide, scale, zero, grid) - wide).max()
    # half a step; float32 rounding of the scale (6e-8) counts once for each of the levels
    assert error <= scale * (0.5 + 1e-7 * grid.levels)


@settings(deadline=None)
@given(value=FLOATS, grid=st.sampled_from(GRIDS))
def test_constant_tensor_is_safe_and_exact_where_float32_can(value: float, grid: Grid) -> None:
    scale, zero = affine(value, value, grid)
    got = float(fake_quantize(np.array([value], np.float64), scale, zero, grid)[0])
    assert abs(got - value) <= max(1e-6 * grid.levels / 255 * abs(value), 1e-36 * grid.levels)


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_get_scale_one(grid: Grid) -> None:
    assert affine(0.0, 0.0, grid) == (1.0, grid.qmin)


def test_fake_quantize_is_what_quantize_linear_does() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * 3
    grid = Grid("uint8", 8)
    scale, zero = affine(-2.0, 4.0, grid)  # some values clip
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array(scale, np.float32), "s"),
        onnx.numpy_helper.from_array(np.array(zero, np.uint8), "z"),
    ]
    made = onnx.helper.make_graph(nodes, "g", [cases.value("x", x.shape)], [cases.value("y", x.shape)], constants)
    (theirs,) = ReferenceEvaluator(onnx.helper.make_model(made)).run(None, {"x": x})
    np.testing.assert_allclose(fake_quantize(x, scale, zero, grid), theirs, rtol=1e-6)


@settings(deadline=None)
@given(
    rows=arrays(np.float32, (3, 9, 4), elements=st.floats(-1e4, 1e4, width=32)),
    smoothing=arrays(np.float32, 4, elements=st.floats(2.0**-10, 2.0**10, width=32)),
)
def test_ranges_after_smoothing_equal_those_of_all_data(
    rows: np.ndarray[Any, Any], smoothing: np.ndarray[Any, Any]
) -> None:
    found = activation_range(cases.value_record(rows), [0, 2], ActivationRecipe(), GRIDS[0], cases.smoothed(smoothing))
    brute = rows[[0, 2]] / smoothing
    assert (found.lo, found.hi) == (min(brute.min(), 0), max(brute.max(), 0)), "to the last bit"


@pytest.mark.parametrize("scaled", [False, True])
def test_ranges_after_a_rotation_reach_the_largest_rows(scaled: bool) -> None:
    """A token of 50 times the norm is none of the sampled rows; its rotated extremes lie in no statistic but `top`."""
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(3, 200, 16)).astype(np.float32)
    rows[1, 150] *= 50
    after = rng.uniform(0.5, 2, 16).astype(np.float32) if scaled else None
    transform, value = cases.rotated(8, after), cases.value_record(rows)
    turned = rows @ np.kron(np.eye(2), hadamard.matrix(8)) / (1 if after is None else after)
    found = activation_range(value, [0, 1], ActivationRecipe(), GRIDS[0], transform)
    # 1e-5: two orders of the same float32 sums
    assert found.lo == pytest.approx(turned[:2].min(), rel=1e-5)
    assert found.hi == pytest.approx(turned[:2].max(), rel=1e-5)
    assert found.why == "min and max, rotated, of 72 of 400 rows"
    # planted: without the rows of largest norm the range misses the token
    blind = activation_range(replace(value, top=None), [0, 1], ActivationRecipe(), GRIDS[0], transform)
    assert blind.hi < 0.2 * found.hi


def test_clipping_is_refused_when_it_only_helps_the_sample() -> None:
    """A search on a sample that misses the extremes would cut them off; the known extremes prevent it."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (2, 512, 16)).astype(np.float32)
    rows[:, 100:, :] *= 8  # the sample, the first 32 rows, sees an eighth of the range
    found = activation_range(cases.value_record(rows), [0, 1], ActivationRecipe(range="mse"), GRIDS[0])
    truth = rows.reshape(-1)
    narrow = affine(float(rows[:, :32].min()), float(rows[:, :32].max()), GRIDS[0])
    ours = np.square(truth - fake_quantize(truth, found.scale, found.zero_point, GRIDS[0])).mean()
    theirs = np.square(truth - fake_quantize(truth, *narrow, GRIDS[0])).mean()
    full = np.square(truth - fake_quantize(truth, *affine(-8, 8, GRIDS[0]), GRIDS[0])).mean()
    assert theirs > 100 * full, "the trap is real"
    assert ours < 1.5 * full


@pytest.mark.parametrize(("method", "bits"), [("mse", 4), ("percentile", 4)])
def test_clipping_is_taken_where_it_pays(method: Any, bits: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2, 2000, 64)).astype(np.float32)
    rows[0, 500, 3] = 30  # one value of 256 000
    value, grid = cases.value_record(rows), Grid("uint4", bits)
    found = activation_range(value, [0, 1], ActivationRecipe(range=method, percentile=99.9), grid)
    plain = activation_range(value, [0, 1], ActivationRecipe(), grid)
    truth = rows.reshape(-1)

    def error(scale: float, zero: int) -> float:
        return float(np.square(truth - fake_quantize(truth, scale, zero, grid)).mean())

    assert found.hi < 6 and plain.hi == 30
    assert error(found.scale, found.zero_point) < 0.1 * error(plain.scale, plain.zero_point), "on all tokens"
    assert "held-out error" in found.why


def test_ranges_never_leave_the_known_extremes() -> None:
    rows = np.random.default_rng(2).normal(size=(2, 64, 8)).astype(np.float32)
    for settings_ in (ActivationRecipe(range="percentile", percentile=100.0), ActivationRecipe(range="mse")):
        found = activation_range(cases.value_record(rows), [0, 1], settings_, GRIDS[0])
        assert rows.min() <= found.lo <= 0 <= found.hi <= rows.max()
