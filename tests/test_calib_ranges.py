"""Ranges: every grid holds zero, covers its data, and rounds by half a step at most."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tests import calib_cases as cases
from vdq_export.calib import ranges
from vdq_export.calib.ranges import Grid, activation_range, affine, fake_quantize, weight_scale
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
    found = activation_range(cases.value_record(rows), [0, 2], ActivationRecipe(), GRIDS[0], smoothing)
    brute = rows[[0, 2]] / smoothing
    assert (found.lo, found.hi) == (min(brute.min(), 0), max(brute.max(), 0)), "to the last bit"


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


# -- weights ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(weight=MATRICES, qmax=st.sampled_from([7, 63, 127]))
def test_weight_error_is_half_a_step_at_most(weight: np.ndarray[Any, Any], qmax: int) -> None:
    scale = weight_scale(weight, qmax)
    assert (scale > 0).all() and scale.shape == (weight.shape[1],)
    wide = weight.astype(np.float64)
    quantized = np.clip(np.rint(wide / scale), -qmax, qmax) * scale
    # a channel below the smallest normal scale (1e-38) is rounded to zero
    assert (np.abs(quantized - wide) <= 0.5001 * scale).all() or np.abs(wide[:, scale == 1]).max() < 1e-35


def test_dead_weight_channel_is_safe() -> None:
    weight = np.zeros((4, 3), np.float32)
    weight[:, 1] = 2.54
    for method in ("minmax", "mse"):
        np.testing.assert_allclose(weight_scale(weight, 127, None, method), [1, 0.02, 1], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), qmax=st.sampled_from([7, 127]))
def test_mse_weights_are_never_worse_than_minmax(seed: int, qmax: int) -> None:
    minmax, mse = weight_errors(seed, qmax)
    assert (mse <= minmax * (1 + 1e-5)).all()


def test_mse_weights_narrow_heavy_tails_at_four_bits() -> None:
    """Over 20 draws, since in a single one the largest weight may be most of the error whatever the scale."""
    errors = np.array([[one.sum() for one in weight_errors(seed, 7)] for seed in range(20)]).sum(axis=0)
    assert errors[1] < 0.95 * errors[0]


def weight_errors(seed: int, qmax: int) -> list[np.ndarray]:
    """Squared error of each of 5 heavy-tailed columns under min-max and under mse scales."""
    weight = np.random.default_rng(seed).standard_t(3, size=(256, 5)).astype(np.float32)
    return [
        np.square(ranges.quantize_weight(weight, weight_scale(weight, qmax, None, m), qmax) - weight).sum(axis=0)
        for m in ("minmax", "mse")
    ]


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, method: str, transposed: bool) -> None:
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(37, 41)).astype(np.float32)
    weight = weight.T if transposed else weight
    smoothing = rng.uniform(0.1, 10, weight.shape[0]).astype(np.float32)
    whole = weight_scale(weight, 127, smoothing, method)
    rows = ranges.row_peaks(weight)
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 512)
    np.testing.assert_array_equal(weight_scale(weight, 127, smoothing, method), whole)
    np.testing.assert_array_equal(ranges.row_peaks(weight), rows)
    np.testing.assert_array_equal(rows, np.abs(weight).max(axis=1))
    if method == "minmax":
        expected = np.abs(weight * smoothing[:, None]).max(axis=0) / np.float32(127)
        np.testing.assert_array_equal(whole, expected)
