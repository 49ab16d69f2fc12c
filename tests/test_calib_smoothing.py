"""Channel scales follow their formulas, and searches take what is better on the layer's output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests import calib_cases as cases
from vdq_export import hadamard
from vdq_export.calib import smoothing
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.ranges import Grid, affine, fake_quantize
from vdq_export.calib.smoothing import Group, scales
from vdq_export.calib.transform import Transform
from vdq_export.recipe import ActivationRecipe, SmoothingRecipe

Array = np.ndarray[Any, Any]
PEAKS = arrays(np.float32, 6, elements=st.floats(0, 2.0**20, width=32))
EIGHT, FORMAT = Grid("uint8", 8), WeightFormat("int8", 8, 127)
BINS = [[0, 1], [2, 3]]


def group(outliers: float = 1.0, seed: int = 0, layers: int = 1) -> Group:
    """Activations with two channels `outliers` times as large as the rest, their weights as much smaller."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, 32, 24)).astype(np.float32)
    rows[:, :, :2] *= outliers
    weights = tuple(rng.normal(size=(24, 16)).astype(np.float32) for _ in range(layers))
    for weight in weights:
        weight[:2] /= outliers
    return Group(cases.value_record(rows), tuple("qkv"[:layers]), weights, EIGHT, FORMAT)


def chosen(one: Group, **settings: Any) -> smoothing.Choice:
    recipe = SmoothingRecipe(**{"kind": "asq", **settings})
    return smoothing.choose([one], recipe, ActivationRecipe(), "minmax", BINS)[0]


def vector(choice: smoothing.Choice) -> Array:
    assert choice.scale is not None
    return choice.scale


def test_peaks_are_a_running_average_with_momentum() -> None:
    value = cases.value_record(np.array([[[1.0]], [[3.0]], [[5.0]]], np.float32))
    assert smoothing.running_average(value, [0, 1, 2], 0.0) == pytest.approx([5.0])
    assert smoothing.running_average(value, [0, 1, 2], 0.95) == pytest.approx([0.95 * (0.95 * 1 + 0.05 * 3) + 0.05 * 5])
    assert smoothing.running_average(value, [1, 2], 0.95) == pytest.approx([0.95 * 3 + 0.05 * 5])


@settings(deadline=None)
@given(a=PEAKS, w=PEAKS, alpha=st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_scales_follow_the_formula_up_to_one_factor(a: Array, w: Array, alpha: float) -> None:
    s = scales(a, w, alpha)
    assert np.isfinite(s).all() and (s > 0).all()
    live = (a > 1e-10) & (w > 1e-10)
    if live.sum() == ((a >= smoothing.SILENT) & (w >= smoothing.SILENT)).sum() and live.any():
        wanted = a[live].astype(float) ** alpha / w[live].astype(float) ** (1 - alpha)
        ratio = s[live] / wanted
        assert ratio.max() / ratio.min() == pytest.approx(1, rel=1e-5)
        assert np.exp(np.log(s[live].astype(float)).mean()) == pytest.approx(1, rel=1e-5)


@settings(deadline=None)
@given(a=PEAKS, w=PEAKS, alpha=st.sampled_from([0.1, 0.5, 1.0]))
def test_dead_channels_widen_nothing(a: Array, w: Array, alpha: float) -> None:
    s = scales(a, w, alpha).astype(float)
    live = (a >= smoothing.SILENT) & (w >= smoothing.SILENT)
    if live.any():
        assert (s * w).max() <= (s * w)[live].max() * (1 + 1e-6)
        assert (a / s).max() <= (a / s)[live].max() * (1 + 1e-6)


def test_denormal_peaks_are_dead_channels() -> None:
    """A weight of 1e-45 once pushed its neighbour's scale below what float32 holds, to zero."""
    s = scales(np.array([1.0, 0.0], np.float32), np.array([1e-45, 2.0], np.float32), 0.0)
    np.testing.assert_array_equal(s, [1.0, 1.0])


def test_fixed_alpha_and_shared_scale() -> None:
    one = group(layers=3)
    found = chosen(one, alpha=0.5)
    assert found.smoothing is not None and found.smoothing.alpha == 0.5
    joint = np.abs(np.concatenate(one.weights, axis=1)).max(axis=1)
    peaks = smoothing.running_average(one.value, [0, 1, 2, 3], 0.95)
    np.testing.assert_array_equal(np.array(found.smoothing.scale, np.float32), scales(peaks, joint, 0.5))
    assert found.why == "alpha 0.5 fixed by the recipe"


def test_search_smooths_outliers_and_says_what_it_gained() -> None:
    found = chosen(group(outliers=60), alpha="search")
    assert found.smoothing is not None
    assert "of 11 candidates: output error" in found.why and "unsmoothed" in found.why
    smooth, bare = (float(w) for w in found.why.replace("unsmoothed", "").split("error ")[1].split(" against "))
    assert smooth < 0.1 * bare


def test_search_leaves_even_channels_alone() -> None:
    rng = np.random.default_rng(0)
    rows = rng.choice([-1.0, 0.3, 1.0], (4, 32, 24)).astype(np.float32)
    weight = rng.choice([-1.0, 0.7, 1.0], (24, 16)).astype(np.float32)
    even = Group(cases.value_record(rows), ("q",), (weight,), EIGHT, FORMAT)
    found = chosen(even, alpha="search")
    assert found.smoothing is None and found.why.startswith("unsmoothed of 11 candidates")


@pytest.mark.parametrize("bits", [8, 4])
def test_search_error_is_that_of_the_quantized_layer(bits: int) -> None:
    """The number the search compares, against quantizing the layer by hand; a fold left out or turned round differs."""
    one = group(outliers=20)
    fmt = WeightFormat("int8", bits, 2 ** (bits - 1) - 1)
    one = replace(one, format=fmt)
    peaks = smoothing._Peaks(smoothing.running_average(one.value, range(4), 0.95), np.abs(one.weights[0]).max(axis=1))
    errors = smoothing._errors(
        one, lambda known: smoothing._smoothings(peaks, None, known), ActivationRecipe(), "minmax", BINS
    )
    rows = one.value.linear()[1]

    def by_hand(s: Array, fold: Array) -> float:
        w = one.weights[0] * fold[:, None]
        step = np.abs(w).max(axis=0) / fmt.qmax
        difference, power = 0.0, 0.0
        for part in (rows[:2], rows[2:]):
            x = (part / s).reshape(-1, 24)
            delta = (x.max() - x.min()) / 255
            y = (np.rint(x / delta) * delta) @ (np.rint(w / step) * step)
            exact = part.reshape(-1, 24) @ one.weights[0]
            difference, power = difference + np.square(y - exact).sum(), power + np.square(exact).sum()
        return float(difference / power)

    s = scales(*peaks[:2], 0.5)
    for index, scale in ((0, np.ones(24, np.float32)), (5, s)):
        # 2 %: the range's ends may clip by half a step
        assert errors[index] == pytest.approx(by_hand(scale, scale), rel=0.02)
    for planted in (np.ones(24, np.float32), 1 / s, np.roll(s, 1)):
        assert by_hand(s, planted) > 10 * errors[5]


def test_global_search_gives_all_values_one_alpha() -> None:
    groups = [group(60, 0), group(30, 1), group(1, 2)]
    recipe = SmoothingRecipe(kind="asq", alpha="search", scope="global")
    found = smoothing.choose(groups, recipe, ActivationRecipe(), "minmax", [[0, 1, 2, 3]])
    assert len({c.smoothing.alpha for c in found if c.smoothing}) == 1 and all(c.smoothing for c in found)
    assert "over 3 values" in found[0].why


def test_no_smoothing_and_dead_layers() -> None:
    assert smoothing.choose([group()], SmoothingRecipe(), ActivationRecipe(), "minmax", [[0]])[0].smoothing is None
    dead = Group(cases.value_record(np.zeros((4, 8, 24), np.float32)), ("q",), group().weights, EIGHT, FORMAT)
    assert chosen(dead, alpha="search").smoothing is None
    fixed = chosen(dead, alpha=0.5).smoothing
    assert fixed is not None and set(fixed.scale) == {1.0}


# -- the kinds -------------------------------------------------------------------------------------------------------


def drifting(spread: float = 0.0) -> Group:
    """Channels of different sizes that grow from slot to slot, all alike but for e^±spread."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, 60, 24) * np.array([1.0, 1.0, 5.0, 5.0])[:, None]
    sizes = sizes * np.exp(spread * rng.choice([-1, 1], (4, 24)))
    rows = (rng.uniform(-1, 1, (4, 400, 24)) * sizes[:, None, :]).astype(np.float32)
    rows[:, 0], rows[:, 1] = sizes, -0.8 * sizes  # peaks are the sizes
    weight = rng.normal(size=(24, 16)).astype(np.float32)
    return Group(cases.value_record(rows, most=400), ("q",), (weight,), EIGHT, FORMAT)


def test_absmax_takes_the_largest_magnitude_of_all_tokens() -> None:
    """Of all tokens: the running average of the same slots says something else."""
    one = group(outliers=20, seed=3)
    rows = one.value.linear()[1].copy()
    rows[2, 5, 7] = -90
    one = replace(one, value=cases.value_record(rows))
    weight = np.abs(one.weights[0]).max(axis=1)
    found = vector(chosen(one, kind="absmax"))
    np.testing.assert_array_equal(found, scales(np.abs(rows).max(axis=(0, 1)), weight, 0.5))
    assert not np.allclose(found, vector(chosen(one, kind="asq")), rtol=0.1)


def test_tsq_of_one_bin_looks_at_its_slots_only() -> None:
    one, recipe = drifting(spread=0.5), SmoothingRecipe(kind="tsq")
    weight = np.abs(one.weights[0]).max(axis=1)
    found = [vector(smoothing.choose([one], recipe, ActivationRecipe(), "minmax", [mine])[0]) for mine in BINS]
    for mine, s in zip(BINS, found, strict=True):
        np.testing.assert_array_equal(s, scales(smoothing.running_average(one.value, mine, 0.95), weight, 0.5))
    assert not np.allclose(found[0], found[1], rtol=0.2)


def test_tsq_search_measures_its_own_bin() -> None:
    """The other bin's rows are beyond all bounds: whoever looks at them finds another error."""
    one = drifting()
    rows = one.value.linear()[1].copy()
    rows[2:] *= 1e6
    spoilt = replace(one, value=cases.value_record(rows, most=400))
    recipe = SmoothingRecipe(kind="tsq", alpha="search")
    ours, same = (smoothing.choose([g], recipe, ActivationRecipe(), "minmax", BINS[:1])[0] for g in (one, spoilt))
    assert ours == same and ours.smoothing is not None


def test_rank_one_fit() -> None:
    vector_, scalars = np.array([1.0, 4.0, 0.5]), np.array([0.25, 1.0, 8.0])
    fit = smoothing.rank_one(list(scalars[:, None] * vector_))
    np.testing.assert_allclose(fit.scalars[:, None] * fit.vector, scalars[:, None] * vector_, rtol=1e-12)
    assert fit.residual < 1e-12
    noise = np.exp(np.random.default_rng(0).normal(size=(3, 3)) / 10)
    table = scalars[:, None] * vector_ * noise
    best = smoothing.rank_one(list(table))

    def loss(v: Array, s: Array) -> float:
        return float(np.square(np.log(table) - np.log(s)[:, None] - np.log(v)).mean() ** 0.5)

    assert loss(best.vector, best.scalars) == pytest.approx(best.residual)
    for k in range(3):  # least squares: moving any number makes it worse
        for factor in (0.99, 1.01):
            moved = np.where(np.arange(3) == k, factor, 1.0)
            assert loss(best.vector * moved, best.scalars) > best.residual
            assert loss(best.vector, best.scalars * moved) > best.residual


def test_rank_one_fit_of_dead_channels_is_finite() -> None:
    fit = smoothing.rank_one([np.array([0.0, 0.0, 3.0]), np.array([0.0, 2.0, 12.0])])
    np.testing.assert_allclose(fit.vector, [0, 2, 6])
    np.testing.assert_allclose(fit.scalars, [0.5, 2])
    assert smoothing.rank_one([np.zeros(3)])[2] == 0


def test_shared_tsq_is_the_geometric_mean_over_bins() -> None:
    one = drifting(spread=0.4)
    found = chosen(one, kind="tsq", shared=True)
    bins = [smoothing.running_average(one.value, mine, 0.95) for mine in BINS]
    weight = np.abs(one.weights[0]).max(axis=1)
    own = np.stack([scales(a, weight, 0.5) for a in bins]).astype(float)
    np.testing.assert_allclose(vector(found), np.exp(np.log(own).mean(axis=0)), rtol=1e-5)  # both of geometric mean 1
    assert "one vector for 2 bins, whose ranges absorb factors of 0.4" in found.why and "(rms)" in found.why


@pytest.mark.parametrize("sigma", [0.25, 4.0, 3.7])
def test_the_ranges_absorb_the_scalars_of_shared_tsq(sigma: float) -> None:
    """Own vector σ·s with own weights σ·s·W and own ranges: the same integers, and the same outputs, as s, s·W, σ·Δ."""
    one = drifting()
    s, w, x = vector(chosen(one, kind="tsq", shared=True)), one.weights[0], one.value.sample([0, 1])
    own = (s.astype(np.float64) * sigma).astype(np.float32)
    ranges = [affine(float((x / v).min()), float((x / v).max()), EIGHT) for v in (s, own)]
    (delta, zero), (own_delta, own_zero) = ranges
    assert zero == own_zero and delta == pytest.approx(sigma * own_delta, rel=2e-7)  # a float32 rounding each
    integers, own_integers = np.rint(x / s / np.float32(delta)), np.rint(x / own / np.float32(own_delta))
    y, own_y = (delta * integers) @ (s[:, None] * w), (own_delta * own_integers) @ (own[:, None] * w)
    if sigma in (0.25, 4.0):  # powers of two: to the last bit
        np.testing.assert_array_equal(integers, own_integers)
        np.testing.assert_array_equal(delta, sigma * own_delta)
    assert (integers != own_integers).mean() < 1e-3, "ties apart"
    np.testing.assert_allclose(y, own_y, atol=2 * delta * np.abs(s[:, None] * w).max())
    planted = (own_delta * own_integers) @ (s[:, None] * w)  # the scalar forgotten
    assert np.abs(planted - y).max() > 0.5 * np.abs(y).max()


def test_shared_tsq_equals_own_vectors_where_bins_differ_by_a_scalar() -> None:
    one, recipe = drifting(), SmoothingRecipe(kind="tsq")
    shared = vector(chosen(one, kind="tsq", shared=True))
    for mine in BINS:
        own = vector(smoothing.choose([one], recipe, ActivationRecipe(), "minmax", [mine])[0])
        np.testing.assert_allclose(shared, own, rtol=1e-6)


# -- after a rotation ------------------------------------------------------------------------------------------------


def offset(bits: int = 4, spread: float = 1.0) -> Group:
    """Rows with a common offset, which a rotation gathers in one channel."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(4, 64, 32)) * spread + 6).astype(np.float32)
    weight = rng.normal(size=(32, 16)).astype(np.float32)
    grid = Grid("uint8", bits)
    return Group(cases.value_record(rows, most=64), ("q",), (weight,), grid, FORMAT)


def test_scale_after_a_rotation_pays_for_what_the_rotation_gathers() -> None:
    one, transform = offset(), cases.rotated(32)
    found, why = smoothing.after_rotation(one, transform, ActivationRecipe(bits=4), "minmax", BINS)
    assert found is not None and why.startswith("channel scale after the rotation: alpha ") and "unscaled" in why
    rows = one.value.sample(range(4))
    peaks = np.abs(transform(one.value.sample(range(4), top=True))).max(axis=0)
    alpha = float(why.split("alpha ")[1].split()[0])
    wanted = peaks.astype(float) ** alpha
    np.testing.assert_allclose(found, wanted / np.exp(np.log(wanted).mean()), rtol=1e-5)

    def error(after: Array | None, fold: Array | None = None) -> float:
        turned = cases.rotated(32, after)
        w = (turned if fold is None else cases.rotated(32, fold)).weight(one.weights[0])
        x = turned(rows)
        step = np.abs(w).max(axis=0) / 127
        quantized = fake_quantize(x, *affine(float(x.min()), float(x.max()), one.grid), one.grid)
        return float(np.square(quantized @ (np.rint(w / step) * step) - rows @ one.weights[0]).sum())

    bare = error(None)
    assert error(found) < 0.7 * bare
    assert error(found, fold=np.ones(32, np.float32)) > bare, "planted: the weight without c"
    assert error(found, fold=1 / found) > bare, "planted: c turned round"


def test_no_scale_after_a_rotation_that_leaves_channels_even() -> None:
    turned = np.random.default_rng(0).choice([-1.0, 0.3, 1.0], (4, 64, 32))
    rows = (turned @ hadamard.matrix(32).T).astype(np.float32)
    one = replace(offset(), value=cases.value_record(rows, most=64))
    found, why = smoothing.after_rotation(one, cases.rotated(32), ActivationRecipe(bits=4), "minmax", BINS)
    assert found is None and "unscaled of 11 candidates" in why


def test_no_scale_after_a_rotation_where_the_weight_pays_more() -> None:
    """Four-bit weights under 16-bit activations, the gathered channel's row the largest as it is."""
    turned = offset().weights[0].copy()
    turned[0] *= 30
    one = replace(
        offset(),
        weights=(hadamard.matrix(32) @ turned,),
        format=WeightFormat("int8", 4, 7),
        grid=Grid("uint16", 16),
    )
    found, _ = smoothing.after_rotation(one, cases.rotated(32), ActivationRecipe(bits=16), "minmax", BINS)
    assert found is None


def test_alpha_is_searched_under_the_rotation_that_follows() -> None:
    """An outlier channel that a rotation spreads needs no smoothing; without the rotation it does."""
    one = group(outliers=8)
    one = replace(one, grid=Grid("uint8", 4))
    recipe, activations = SmoothingRecipe(kind="asq", alpha="search"), ActivationRecipe(bits=4)
    turn = cases.rotated(8).rotation
    ours, bare = (
        smoothing.choose([one], recipe, activations, "minmax", BINS, turns)[0].why for turns in ([turn], [None])
    )
    assert ours != bare
    by_hand = smoothing._errors(one, lambda _: [Transform(rotation=turn)], activations, "minmax", BINS)[0]
    assert f"{by_hand:.2e}" in ours


@pytest.mark.parametrize("settings_", [{"granularity": "token"}, {"granularity": "channel"}, {"grid": "mxfp4"}])
def test_search_quantizes_as_the_recipe_will(settings_: dict[str, Any]) -> None:
    """Not under a static range that the recipe will never have."""
    one = replace(offset(), value=cases.value_record(offset().value.linear()[1] * np.geomspace(1, 50, 32, dtype="f4")))
    recipe = SmoothingRecipe(kind="asq", alpha="search")
    ours, fixed = (
        smoothing.choose([one], recipe, ActivationRecipe(bits=4, **extra), "minmax", BINS)[0].why
        for extra in (settings_, {})
    )
    assert ours != fixed


def test_weight_groups_that_do_not_divide_the_width_are_left_out() -> None:
    grouped = replace(group(20), format=WeightFormat("int8", 4, 7, 32))  # 24 channels
    whole = replace(group(20), format=WeightFormat("int8", 4, 7))
    assert chosen(grouped, alpha="search") == chosen(whole, alpha="search")
