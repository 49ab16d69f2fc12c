"""Weight scales: they cover or narrow what they should, codes are the definition's, and blocks change nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from vdq_export.calib import weight_ranges
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.weight_ranges import dequantize, error_std_reduction, quantize, round_rows, scales
from vdq_export.graph import Array

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=FLOATS)
INT = [
    WeightFormat("int8", 8, 127),
    WeightFormat("int8", 8, 63),
    WeightFormat("int8", 6, 31),
    WeightFormat("int4", 4, 7),
]
WIDE = WeightFormat("int16", 16, 32767)
GROUPED = [WeightFormat("int8", 4, 7, group) for group in (32, 64, 128)]
MX = WeightFormat("int8", 4, 12, 32, "e2m1", "e8m0")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
METHODS: tuple[Any, ...] = ("minmax", "mse", "pbq")


def heavy(seed: int, shape: tuple[int, int] = (256, 5)) -> Array:
    """Heavy tails, as the papers describe trained weights."""
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def cells(x: Array, fmt: WeightFormat) -> Array:
    """[G, group, N] of [K, N]."""
    return x.reshape(-1, fmt.group or len(x), x.shape[1])


def errors(weight: Array, fmt: WeightFormat, method: Any) -> Array:
    """Squared error of each cell, [G, N]."""
    scale = scales(weight, fmt, method)
    wide = dequantize(quantize(weight, scale, fmt), scale, fmt).astype(np.float64)
    return np.square(cells(wide - weight, fmt)).sum(axis=1)


def by_definition(weight: Array, scale: Array, fmt: WeightFormat) -> Array:
    """Codes from the text of the definition, one weight at a time in float64: the nearest level, ties to even."""
    step = np.repeat(scale, fmt.group, axis=0) if fmt.group else np.broadcast_to(scale, weight.shape)
    codes = np.empty(weight.shape, np.int64)
    levels = sorted({int(2 * v) for v in E2M1} | {-int(2 * v) for v in E2M1})
    for index, w in np.ndenumerate(weight):
        x = float(w) / float(step[index])
        if fmt.grid == "int":
            codes[index] = min(max(round(x), -fmt.qmax), fmt.qmax)
        else:
            # Magnitudes 0, 1, 2 … of E2M1 in order: even places have an even mantissa bit.
            codes[index] = min(levels, key=lambda q: (abs(x - q), levels.index(q) % 2 != levels.index(0) % 2))
    return codes


@settings(deadline=None)
@given(weight=MATRICES, fmt=st.sampled_from([*INT, WIDE]))
def test_minmax_error_is_half_a_step_at_most(weight: Array, fmt: WeightFormat) -> None:
    scale = scales(weight, fmt)
    assert (scale > 0).all() and scale.shape == (weight.shape[1],) and scale.dtype == np.float32
    wide = weight.astype(np.float64)
    error = np.abs(quantize(weight, scale, fmt) * scale.astype(np.float64) - wide)
    # 1e-7 a step for the float32 quotient; a channel below the smallest normal scale (1e-38) is rounded to zero
    slack = 0.5 + 1e-7 * fmt.qmax
    assert (error <= slack * scale).all() or np.abs(wide[:, scale == 1]).max() < 1e-38 * fmt.qmax


@pytest.mark.parametrize("fmt", [*INT, *GROUPED, WIDE])
@pytest.mark.parametrize("method", METHODS)
def test_dead_cells_are_safe(method: Any, fmt: WeightFormat) -> None:
    weight = np.zeros((128, 3), np.float32)
    weight[0, 1] = 2.5 * fmt.qmax
    scale = scales(weight, fmt, method)
    assert scale.shape == ((128 // fmt.group, 3) if fmt.group else (3,))
    first = scale.reshape(-1, 3)[0]
    np.testing.assert_allclose(first, [1, 2.5, 1], rtol=1e-6)
    assert (scale.reshape(-1, 3)[1:] == 1).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), fmt=st.sampled_from([*INT, *GROUPED, MX]))
def test_no_search_is_worse_than_minmax_in_any_cell(seed: int, fmt: WeightFormat) -> None:
    weight = heavy(seed)
    plain = errors(weight, fmt, "minmax")
    for method in ("mse", "pbq"):
        assert (errors(weight, fmt, method) <= plain * (1 + 1e-5)).all(), method  # 1e-5: float32 sums choose


@pytest.mark.parametrize("fmt", [WeightFormat("int8", 4, 7), GROUPED[2]])
def test_pbq_narrows_heavy_tails_as_well_as_a_full_search(fmt: WeightFormat) -> None:
    """Against 400 bounds a cell: within 2 % of the least error in sum, where min-max is far off."""
    weight = heavy(3, (1024, 40))
    every = []
    for ratio in np.linspace(1, 0.02, 400):
        scale = scales(weight, fmt) * np.float32(ratio)
        wide = dequantize(quantize(weight, scale, fmt), scale, fmt)
        every.append(np.square(cells(wide - weight, fmt), dtype=np.float64).sum(axis=1))
    least = np.min(every, axis=0).sum()
    assert errors(weight, fmt, "pbq").sum() <= 1.02 * least
    assert errors(weight, fmt, "minmax").sum() > 1.15 * least


def test_error_std_reduction_is_what_it_says() -> None:
    weight, fmt = heavy(5, (512, 32)), WeightFormat("int8", 4, 7)
    plain, ours = (np.sqrt(errors(weight, fmt, m).sum()) for m in ("minmax", "pbq"))
    # σ and root mean square differ by the mean error alone, below 1 % of σ for a symmetric distribution
    assert error_std_reduction(weight, fmt) == pytest.approx(1 - ours / plain, abs=0.01)
    assert error_std_reduction(weight, fmt, "minmax") == 0.0
    assert error_std_reduction(np.zeros((4, 4), np.float32), fmt) == 0.0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), fmt=st.sampled_from([*INT, *GROUPED, MX, WIDE]), method=st.sampled_from(METHODS))
def test_codes_are_the_definitions(seed: int, fmt: WeightFormat, method: Any) -> None:
    weight = heavy(seed, (128, 3))
    scale = scales(weight, fmt, method)
    codes = quantize(weight, scale, fmt)
    assert codes.dtype == (np.int16 if fmt is WIDE else np.int8)
    # A quotient in float32 is off by 1e-7 of itself: it may fall on the other side of a tie, one code away.
    expected = by_definition(weight, scale, fmt)
    assert np.abs(codes - expected).max() <= (4 if fmt.grid == "e2m1" else 1)
    assert (codes == expected).mean() > 0.98
    rows = fmt.group or len(weight)
    np.testing.assert_array_equal(round_rows(weight[:rows], scale.reshape(-1, 3)[0], fmt), codes[:rows])


def test_e2m1_codes_and_scales_are_exact() -> None:
    """All elements, all midpoints (ties to the even mantissa) and what saturates, under scales over the whole range."""
    middles = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7.9: 6}
    values = [*E2M1, *middles, *(-v for v in E2M1), *(-v for v in middles)]
    wanted = [*E2M1, *middles.values(), *(-v for v in E2M1), *(-v for v in middles.values())]
    for exponent in (-120, -3, 0, 5, 100):
        weight = np.ldexp(np.array(values, np.float32), exponent)[:, None]
        scale = np.full((1, 1), np.ldexp(0.5, exponent), np.float32)
        codes = quantize(weight, scale, MX)
        np.testing.assert_array_equal(codes[:, 0], 2 * np.array(wanted))
        exact = np.ldexp(np.array(wanted), exponent)
        np.testing.assert_array_equal(dequantize(codes, scale, MX)[:, 0].astype(np.float64), exact)


@settings(deadline=None)
@given(weight=arrays(np.float32, (64, 3), elements=FLOATS), method=st.sampled_from(METHODS))
def test_e8m0_scales_are_powers_of_two_around_the_exponent_of_the_peak(weight: Array, method: Any) -> None:
    scale = scales(weight, MX, method)
    mantissa, exponent = np.frexp(2 * scale)
    assert (mantissa == 0.5).all()
    exponent, peak = exponent - 1, np.abs(cells(weight, MX)).max(axis=1)
    assert ((exponent >= -125) & (exponent <= 127)).all()
    live = peak > 2.0**-120
    floor = np.floor(np.log2(peak, where=live, out=np.zeros_like(peak, np.float64), dtype=np.float64)) - 2
    assert (np.abs(exponent - floor)[live] <= 1).all()
    if method == "minmax":
        assert (6 * np.ldexp(1.0, exponent) >= peak)[live].all(), "nothing saturates"
        assert (6 * np.ldexp(1.0, exponent - 1) < peak)[live].all(), "and no exponent below does that"


def test_e2m1_floor_and_ceiling_both_win_somewhere() -> None:
    """A peak just above 6 units is better cut, a cell of such values is not: the choice is made a block."""
    weight = np.full((64, 1), 1.0, np.float32)
    weight[0] = 6.2  # alone above: floor (exponent 0) keeps the ones exact in steps of a half
    weight[1::2] = 0.5
    weight[32:] = 7.9  # all above: exponent 1 has 8
    assert scales(weight, MX, "pbq")[:, 0].tolist() == [0.5, 1.0]
    assert scales(weight, MX, "minmax")[:, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fmt", [INT[0], INT[3], GROUPED[0], MX])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, method: Any, fmt: WeightFormat, transposed: bool
) -> None:
    weight = np.random.default_rng(3).normal(size=(96, 41)).astype(np.float32)
    weight = np.asfortranarray(weight) if transposed else weight
    whole, rows = scales(weight, fmt, method), weight_ranges.row_peaks(weight)
    codes = quantize(weight, whole, fmt)
    for chunk, piece in ((512, 64), (4096, 700)):
        monkeypatch.setattr(weight_ranges, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(weight_ranges, "_PIECE", piece)
        monkeypatch.setattr(weight_ranges.number_grid, "_CHUNK", chunk)
        np.testing.assert_array_equal(scales(weight, fmt, method), whole)
        np.testing.assert_array_equal(weight_ranges.row_peaks(weight), rows)
        np.testing.assert_array_equal(quantize(weight, whole, fmt), codes)
    np.testing.assert_array_equal(rows, np.abs(weight).max(axis=1))
    if method == "minmax" and fmt.grid == "int":
        peak = np.abs(cells(weight, fmt)).max(axis=1) / np.float32(fmt.qmax)
        np.testing.assert_array_equal(whole, peak if fmt.group else peak[0])


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="33 channels in groups of 32"):
        scales(np.ones((33, 2), np.float32), GROUPED[0])


@pytest.mark.parametrize("fault", ["swapped scales", "shifted group"])
def test_planted_faults_are_seen(fault: str) -> None:
    """The comparison with the definition has teeth: scales of other channels, or of the group before, are caught."""
    fmt, weight = GROUPED[0], heavy(7, (128, 4)) * np.array([1, 2, 4, 8], np.float32)
    weight *= np.repeat([1, 3, 9, 27], 32)[:, None].astype(np.float32)
    scale = scales(weight, fmt)
    wrong = scale[:, ::-1] if fault == "swapped scales" else np.roll(scale, 1, axis=0)
    right = np.abs(dequantize(quantize(weight, scale, fmt), scale, fmt) - weight).max(axis=1)
    off = np.abs(dequantize(quantize(weight, scale, fmt), wrong, fmt) - weight).max(axis=1)
    assert off.max() > 10 * right.max()


def test_scales_span_no_more_than_the_target_takes() -> None:
    """A channel far below the others, and one of zeros, as a zero-initialised modulation has."""
    rng = np.random.default_rng(0)
    weight = (rng.normal(size=(32, 6)) * [1, 0.5, 1e-7, 0, 2, 1e-3]).astype(np.float32)
    free = WeightFormat("int8", 8, 127)
    bound = free._replace(span=2.0**14)
    plain, found = weight_ranges.scales(weight, free), weight_ranges.scales(weight, bound)
    assert found.max() / found.min() <= 2.0**14 * (1 + 1e-6)
    np.testing.assert_array_equal(found[[0, 1, 4, 5]], plain[[0, 1, 4, 5]])
    assert found[3] == plain[4], "zeros take any scale"
    error = np.abs(weight_ranges.dequantize(weight_ranges.quantize(weight, found, bound), found, bound) - weight)
    assert error.max() <= plain[4] / 2 * (1 + 1e-6), "as far off as the largest channel at most"
    assert (weight_ranges.scales(np.zeros((8, 2), np.float32), bound) == 1).all()
