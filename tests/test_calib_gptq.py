"""GPTQ against its definition: column by column, with the inverse of the Hessian and the update the paper writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdq_export.calib import weight_ranges
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.gptq import _CORNER, Factor, Rounded, _triangle, factorise, gptq
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array
from vdq_export.recipe import GptqRecipe
from vdq_export.weights.number_grid import dequantize

INT4 = WeightFormat("int4", 4, 7)
INT4_32 = WeightFormat("int4", 4, 7, 32)
MXFP4 = WeightFormat("int8", 4, 12, 32, "e2m1", "e8m0")
INT8 = WeightFormat("int8", 8, 127)


def inputs(k: int, n: int = 0, seed: int = 0) -> Array:
    """Rows [n, K] with correlated channels, some of them ten times as large as others."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k) + np.eye(k)
    rows = rng.standard_normal((n or 4 * k, k)) @ mixing * np.where(rng.random(k) < 0.1, 10, 1)
    return rows.astype(np.float32)


def weights(k: int, n: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, 1]).standard_normal((k, n)).astype(np.float32)


def scale_of(fmt: WeightFormat) -> Any:
    return lambda w: weight_ranges.scales(w, fmt._replace(group=0))


def ours(weight: Array, hessian: Array, fmt: WeightFormat, settings: GptqRecipe) -> Rounded:
    return gptq(weight, factorise(hessian, settings), fmt, scale_of(fmt), settings)


def definition(weight: Array, hessian: Array, fmt: WeightFormat, settings: GptqRecipe) -> Rounded:
    """Frantar et al., algorithm 1 without blocks: quantize a channel, spread its error over those that are left."""
    k, n = weight.shape
    h = hessian.astype(np.float64) + settings.damping * np.trace(hessian) / k * np.eye(k)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if settings.act_order else np.arange(k)
    group = fmt.group or k
    w, inverse = weight.astype(np.float64), np.linalg.inv(h[np.ix_(order, order)])
    w = w[order]
    scale = weight_ranges.scales(weight, fmt).reshape(-1, n)
    codes = np.empty((k, n), np.int8)
    for i in range(k):
        if i % group == 0 and fmt.group and not settings.act_order:
            scale[i // group] = weight_ranges.scales(w[i : i + group].astype(np.float32), fmt._replace(group=0))
        levels = scale[order[i] // group]
        codes[order[i]] = weight_ranges.round_rows(w[i][None].astype(np.float32), levels, fmt)[0]
        error = (w[i] - codes[order[i]] * levels.astype(np.float64)) / inverse[i, i]
        w[i:] -= inverse[i:, i, None] * error
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]  # of H without row and column i
    return Rounded(codes, scale if fmt.group else scale[0])


def loss(weight: Array, found: Rounded, hessian: Array, damping: float = 0.0) -> Array:
    """eᵀ(H + λI)e of each output channel's e = w − ŵ, [N]."""
    h = hessian.astype(np.float64) + damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
    error = weight - dequantize(found.codes, found.scale).astype(np.float64)
    return np.einsum("kn,kj,jn->n", error, h, error)


def disagreement(found: Rounded, wanted: Rounded) -> float:
    """Share of codes that differ; scales may differ by float32 rounding of the moved weights they were taken from."""
    assert np.allclose(found.scale, wanted.scale, rtol=1e-4)
    return float((found.codes != wanted.codes).mean())


CASES = [
    (17, 5, INT4, GptqRecipe(block=4)),
    (40, 3, INT4, GptqRecipe(damping=0.1)),
    (64, 6, INT4, GptqRecipe(block=128, act_order=True)),
    (96, 6, INT4_32, GptqRecipe(block=32)),
    (160, 6, INT4_32, GptqRecipe(block=100)),
    (128, 6, INT4_32, GptqRecipe(act_order=True)),
    (96, 6, MXFP4, GptqRecipe(block=64)),
    (128, 4, WeightFormat("int4", 4, 7, 64), GptqRecipe(block=32)),
    (70, 4, INT8, GptqRecipe()),
    (1, 3, INT4, GptqRecipe()),
    (5, 1, INT4, GptqRecipe(block=1)),
]


@pytest.mark.parametrize(("k", "n", "fmt", "settings"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_the_definition(k: int, n: int, fmt: WeightFormat, settings: GptqRecipe, seed: int) -> None:
    """Exactly, where float32 and float64 fall on the same side of every boundary between two levels. A weight is next
    to one with a chance of about 1e-5, so in a few thousand all do; one that does not would move those behind it."""
    rows = inputs(k, seed=seed)
    weight, hessian = weights(k, n, seed), rows.T @ rows
    assert disagreement(ours(weight, hessian, fmt, settings), definition(weight, hessian, fmt, settings)) == 0.0


@pytest.mark.parametrize("fault", ["transposed", "sign", "not normalised", "order forgotten", "rounded to nearest"])
def test_wrong_updates_are_seen(fault: str) -> None:
    """The comparison has teeth: each of these gives other codes."""
    settings, rows = GptqRecipe(act_order=True), inputs(64)
    weight, hessian = weights(64, 6), rows.T @ rows
    good = factorise(hessian, settings)
    strictly = np.tril(good.unit, -1)
    size = np.sqrt(np.diagonal(hessian))[good.order][:, None]
    wrong = {
        "transposed": good._replace(unit=strictly.T + strictly.T[::-1, ::-1]),
        "sign": good._replace(unit=-strictly),
        "not normalised": good._replace(unit=strictly * size),
        "order forgotten": good._replace(order=np.arange(64)),
        "rounded to nearest": good._replace(unit=np.eye(64, dtype=np.float32)),
    }[fault]
    found = gptq(weight, wrong, INT4, scale_of(INT4), settings)
    assert disagreement(found, definition(weight, hessian, INT4, settings)) > 0.05


@pytest.mark.parametrize("size", [1, 2, _CORNER - 1, _CORNER, _CORNER + 1, 2 * _CORNER + 88])
def test_triangle_times_its_transpose(size: int) -> None:
    rows = inputs(size, seed=3).astype(np.float64)
    h = rows.T @ rows + np.eye(size)
    lower = h.copy()
    _triangle(lower)
    lower = np.tril(lower)
    assert (np.diagonal(lower) > 0).all()
    # Cholesky's backward error is below size · 2^-53 · ‖H‖, here 1e-13.
    assert np.abs(lower.T @ lower - h).max() <= 1e-12 * np.abs(h).max()


# -- what it is for --------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([INT4, INT4_32, MXFP4, INT8]), st.booleans())
def test_error_is_not_above_that_of_nearest_rounding(seed: int, fmt: WeightFormat, act_order: bool) -> None:
    """With L of H = LᵀL the expected loss of nearest rounding is s²/12 · Σ L_ij² (all of it), GPTQ's s²/12 · Σ L_ii²:
    never more, and no less where channels are independent. What is left is the spread of a sum over 64 · 24 codes,
    sqrt(0.8 / 1536) = 2.3 % of it; a slack of 10 % is four times that, and more than weights moved beyond the largest
    level cost. These inputs are correlated, so in fact it is far below."""
    rows, weight = inputs(64, seed=seed), weights(64, 24, seed)
    hessian, settings = rows.T @ rows, GptqRecipe(act_order=act_order)
    scale = weight_ranges.scales(weight, fmt)
    nearest = Rounded(weight_ranges.quantize(weight, scale, fmt), scale)
    found = ours(weight, hessian, fmt, settings)
    assert np.abs(found.codes).max() <= fmt.qmax
    assert loss(weight, found, hessian, 0.01).sum() <= 1.1 * loss(weight, nearest, hessian, 0.01).sum()


@given(st.integers(0, 1000))
def test_error_is_below_babais_bound(seed: int) -> None:
    """Row i of L·E is L_ii times the distance of a number to its level: s / 2 at most while nothing is clipped."""
    rows, weight = inputs(32, seed=seed), weights(32, 8, seed)
    hessian = rows.T @ rows
    wide = weight_ranges.scales(weight, INT4) * np.float32(4)  # room for what is moved
    found = gptq(weight, factorise(hessian, GptqRecipe()), INT4, lambda w: wide, GptqRecipe())
    assert np.abs(found.codes).max() < INT4.qmax
    h = hessian.astype(np.float64)
    h += 0.01 * np.trace(h) / 32 * np.eye(32)
    _triangle(h)
    bound = wide.astype(np.float64) ** 2 / 4 * (np.diagonal(h) ** 2).sum()
    assert (loss(weight, found, hessian, 0.01) <= bound * (1 + 1e-4)).all()  # float32 against float64


def test_correlated_inputs_gain_much() -> None:
    """A hundred channels that move together: errors of one are taken back by the next."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((400, 10)) @ rng.standard_normal((10, 100))).astype(np.float32)
    weight = weights(100, 20)
    scale = weight_ranges.scales(weight, INT4)
    nearest = Rounded(weight_ranges.quantize(weight, scale, INT4), scale)
    hessian = rows.T @ rows
    assert (
        loss(weight, ours(weight, hessian, INT4, GptqRecipe()), hessian).sum()
        < loss(weight, nearest, hessian).sum() / 10
    )


# -- Hessians that are not nice --------------------------------------------------------------------------------------


def test_damping_is_raised_until_cholesky_succeeds() -> None:
    """A Hessian summed in low precision can have an eigenvalue below zero by more than the damping."""
    rows = inputs(20)
    hessian = (rows.T @ rows).astype(np.float32)
    values, vectors = np.linalg.eigh(hessian.astype(np.float64))
    mean = values.mean()
    values[0] = -0.05 * mean
    bad = ((vectors * values) @ vectors.T).astype(np.float32)
    found = factorise(bad, GptqRecipe())
    assert (found.raised, found.damping) == (1, pytest.approx(0.1))
    values[0] = -10 * mean
    assert factorise(((vectors * values) @ vectors.T).astype(np.float32), GptqRecipe()).raised >= 4
    assert factorise(hessian, GptqRecipe()).raised == 0


def test_float64_comes_before_more_damping() -> None:
    """Fewer rows than channels and next to no damping: singular in float32, not in float64."""
    rows = inputs(300, n=10, seed=2)
    hessian = rows.T @ rows
    settings = GptqRecipe(damping=1e-9)
    lower = hessian.copy()
    lower[np.diag_indices_from(lower)] += np.float32(1e-9 * np.trace(hessian) / 300)
    with pytest.raises(np.linalg.LinAlgError):
        _triangle(lower)
    assert np.isfinite(factorise(hessian, settings).unit).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_hessian_that_is_not_finite_is_refused(bad: float) -> None:
    hessian = np.eye(4, dtype=np.float32)
    hessian[2, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        factorise(hessian, GptqRecipe())


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_are_rounded_to_nearest(act_order: bool) -> None:
    rows = inputs(40)
    rows[:, [3, 17]] = 0
    weight, settings = weights(40, 6), GptqRecipe(act_order=act_order)
    found = ours(weight, rows.T @ rows, INT4, settings)
    nearest = weight_ranges.quantize(weight, weight_ranges.scales(weight, INT4), INT4)
    assert np.array_equal(found.codes[[3, 17]], nearest[[3, 17]])
    assert (found.codes != nearest).any()
    silent = ours(weight, np.zeros((40, 40), np.float32), INT4, settings)
    assert np.array_equal(silent.codes, nearest)


def test_one_factor_serves_all_weights_and_nothing_is_changed() -> None:
    rows = inputs(48)
    hessian = rows.T @ rows
    kept, first = hessian.copy(), weights(48, 5)
    factor: Factor = factorise(hessian, GptqRecipe())
    weight = np.asfortranarray(first)
    alone = gptq(weight, factor, INT4, scale_of(INT4), GptqRecipe())
    both = gptq(np.concatenate([first, first[:, ::-1]], axis=1), factor, INT4, scale_of(INT4), GptqRecipe())
    assert np.array_equal(both.codes[:, :5], alone.codes)
    assert np.array_equal(both.codes[:, 5:], alone.codes[:, ::-1])
    assert np.array_equal(hessian, kept)
    assert np.array_equal(weight, first)
