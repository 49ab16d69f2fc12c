"""ASQ scales follow the formula, and the search takes what is better on the layer's output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests import calib_cases as cases
from vdq_export.calib import smoothing
from vdq_export.calib.ranges import Grid
from vdq_export.calib.smoothing import Group, scales
from vdq_export.recipe import ActivationRecipe, SmoothingRecipe

Array = np.ndarray[Any, Any]
PEAKS = arrays(np.float32, 6, elements=st.floats(0, 2.0**20, width=32))


def group(outliers: float = 1.0, seed: int = 0, layers: int = 1) -> Group:
    """Activations with two channels `outliers` times as large as the rest, their weights as much smaller."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(4, 32, 24)).astype(np.float32)
    rows[:, :, :2] *= outliers
    weights = tuple(rng.normal(size=(24, 16)).astype(np.float32) for _ in range(layers))
    for weight in weights:
        weight[:2] /= outliers
    return Group(cases.value_record(rows), tuple("qkv"[:layers]), weights, Grid("uint8", 8), 127)


def chosen(one: Group, **settings: Any) -> smoothing.Choice:
    recipe = SmoothingRecipe(kind="asq", **settings)
    return smoothing.choose([one], recipe, ActivationRecipe(), "minmax", [[0, 1], [2, 3]])[0]


def test_peaks_are_a_running_average_with_momentum() -> None:
    value = cases.value_record(np.array([[[1.0]], [[3.0]], [[5.0]]], np.float32))
    assert smoothing.activation_peaks(value, 0.0) == pytest.approx([5.0])
    assert smoothing.activation_peaks(value, 0.95) == pytest.approx([0.95 * (0.95 * 1 + 0.05 * 3) + 0.05 * 5])


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
    np.testing.assert_array_equal(
        np.array(found.smoothing.scale, np.float32), scales(smoothing.activation_peaks(one.value, 0.95), joint, 0.5)
    )
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
    even = Group(cases.value_record(rows), ("q",), (weight,), Grid("uint8", 8), 127)
    found = chosen(even, alpha="search")
    assert found.smoothing is None and found.why.startswith("unsmoothed of 11 candidates")


def test_search_error_is_that_of_the_quantized_layer() -> None:
    """The number the search compares, against quantizing the layer by hand."""
    one = group(outliers=20)
    peaks = (smoothing.activation_peaks(one.value, 0.95), np.abs(one.weights[0]).max(axis=1))
    errors = smoothing._errors(one, peaks, ActivationRecipe(), "minmax", [[0, 1], [2, 3]])
    rows = one.value.linear()[1]
    for index, alpha in ((0, None), (5, 0.5)):
        s = np.ones(24, np.float32) if alpha is None else scales(*peaks, alpha)
        w = one.weights[0] * s[:, None]
        step = np.abs(w).max(axis=0) / 127
        difference, power = 0.0, 0.0
        for part in (rows[:2], rows[2:]):
            x = (part / s).reshape(-1, 24)
            delta = (x.max() - x.min()) / 255
            y = (np.rint(x / delta) * delta) @ (np.rint(w / step) * step)
            exact = part.reshape(-1, 24) @ one.weights[0]
            difference, power = difference + np.square(y - exact).sum(), power + np.square(exact).sum()
        assert errors[index] == pytest.approx(difference / power, rel=0.02)  # the range's ends may clip by half a step


def test_global_search_gives_all_values_one_alpha() -> None:
    groups = [group(60, 0), group(30, 1), group(1, 2)]
    recipe = SmoothingRecipe(kind="asq", alpha="search", scope="global")
    found = smoothing.choose(groups, recipe, ActivationRecipe(), "minmax", [[0, 1, 2, 3]])
    assert len({c.smoothing.alpha for c in found if c.smoothing}) == 1 and all(c.smoothing for c in found)
    assert "over 3 values" in found[0].why


def test_no_smoothing_and_dead_layers() -> None:
    assert smoothing.choose([group()], SmoothingRecipe(), ActivationRecipe(), "minmax", [[0]])[0].smoothing is None
    dead = Group(cases.value_record(np.zeros((4, 8, 24), np.float32)), ("q",), group().weights, Grid("uint8", 8), 127)
    assert chosen(dead, alpha="search").smoothing is None
    fixed = chosen(dead, alpha=0.5).smoothing
    assert fixed is not None and set(fixed.scale) == {1.0}
