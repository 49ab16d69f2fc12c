"""Quantizer ranges of activations, per tensor: uniform integers, or E4M3 numbers. Weights: weight_ranges.py.

Legend: S slots, n sampled rows a slot. A grid of `bits` bits has levels
qmin … qmin + 2^bits − 1 of its integer type (so 6-bit values may live in an 8-bit type), and always holds zero exactly.
A symmetric grid has zero point 0; its highest level stands for the larger end.

Exact minimum and maximum come from all tokens; the sampled rows only say where values are dense. After a rotation the
extremes of a channel are not in the record: they are those of the sampled rows and of the rows of largest norm. A range
narrower than [min, max] is taken only if it is better on sampled rows it was not searched on, known extremes included:
a search on a sample alone cuts off what the sample happens to miss, which costs decibels at 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vdq_export.calib.record import ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.graph import Array
from vdq_export.plan import E4M3_MAX, ActivationType, Range, bounds
from vdq_export.recipe import ActivationRecipe
from vdq_export.weights.number_grid import nearest

GAIN = 0.95  # a narrower range must have at most this share of the full range's error on held-out rows
SEARCH_VALUES = 1 << 15  # sampled values a search looks at
_TINY = float(np.finfo(np.float32).tiny)


class Grid(NamedTuple):
    """Where a quantizer's levels lie: integers, or float8e4m3fn numbers (symmetric always)."""

    dtype: ActivationType
    bits: int
    symmetric: bool = False

    @property
    def qmin(self) -> int:
        return bounds(self.dtype, self.bits)[0]

    @property
    def levels(self) -> int:
        """From the lowest to the highest level."""
        low, high = bounds(self.dtype, self.bits)
        return high - low


class Exact(NamedTuple):
    """Known per-channel extremes of one value over the slots of a bin, transformed: lo, hi [S, C]; tokens [S]."""

    lo: Array
    hi: Array
    tokens: Array


def affine(lo: float, hi: float, grid: Grid) -> tuple[float, int]:
    """(scale, zero_point) of the grid over [min(lo, 0), max(hi, 0)].

    The scale is a float32 number. An empty range (all zeros, or too small for float32) gets scale 1.
    """
    low, high = min(lo, 0.0), max(hi, 0.0)
    if grid.symmetric:
        scale = float(np.float32(max(-low, high) / (grid.qmin + grid.levels)))
        return (scale if scale >= _TINY else 1.0), 0
    scale = float(np.float32((high - low) / grid.levels))
    if scale < _TINY:
        return 1.0, grid.qmin
    zero = grid.qmin + round(-low / scale)
    return scale, min(max(zero, grid.qmin), grid.qmin + grid.levels)


def fake_quantize(x: Array, scale: float, zero_point: int, grid: Grid) -> Array:
    """x̂ = scale · (clip(round(x / scale) + z, qmin, qmin + levels) − z), in the dtype of x."""
    if grid.dtype == "float8e4m3fn":
        found: Array = nearest(x / x.dtype.type(scale), E4M3_MAX, "e4m3")
        found *= x.dtype.type(scale)
        return found
    quotient: Array = np.rint(x / x.dtype.type(scale))
    np.clip(quotient, grid.qmin - zero_point, grid.qmin + grid.levels - zero_point, out=quotient)
    quotient *= x.dtype.type(scale)
    return quotient


def exact(value: ValueRecord, slots: Sequence[int], transform: Transform | None = None) -> Exact:
    """Extremes over some slots of what the transform makes of a value.

    Without a rotation they are exact, because division by a positive number keeps order; with one they are those of
    the rows that were kept, the largest among them.
    """
    index = np.asarray(slots)
    if transform is not None and transform.rotation is not None:
        rows = transform(value.sample(slots, top=True)).reshape(len(index), -1, value.channels)
        return Exact(rows.min(axis=1), rows.max(axis=1), value.count[index])
    lo, hi = value.lo[index], value.hi[index]
    if transform is not None:
        lo, hi = transform(lo), transform(hi)
    return Exact(lo, hi, value.count[index])


def activation_range(
    value: ValueRecord,
    slots: Sequence[int],
    settings: ActivationRecipe,
    grid: Grid,
    transform: Transform | None = None,
) -> Range:
    """The range one bin gets: the method of the recipe, or the full range where that is no better on held-out rows."""
    bounds = exact(value, slots, transform)
    lo, hi = min(float(bounds.lo.min()), 0.0), max(float(bounds.hi.max()), 0.0)
    why = f"min and max of {int(bounds.tokens.sum())} rows"
    if transform is not None and transform.rotation is not None:
        why = f"min and max, rotated, of {len(value.sample(slots, top=True))} of {int(bounds.tokens.sum())} rows"
    if settings.range != "minmax" and hi > lo:
        search, held_out = _halves(value.linear()[1][np.asarray(slots)], transform)
        if settings.range == "percentile":
            found, named = _percentile(search, lo, hi, settings.percentile), f"percentile {settings.percentile:g}"
        else:
            found, named = _least_error(search, bounds, lo, hi, grid), "least squared error"
        full = clip_error(held_out, bounds, *affine(lo, hi, grid), grid)
        ours = clip_error(held_out, bounds, *affine(*found, grid), grid)
        if ours <= GAIN * full:
            (lo, hi), why = found, f"{named}: held-out error {ours:.2e} against {full:.2e} of {why}"
        else:
            why = f"{why} ({named} gains nothing on held-out rows)"
    scale, zero = affine(lo, hi, grid)
    return Range(lo=lo, hi=hi, scale=scale, zero_point=zero, why=why)


def clip_error(values: Array, bounds: Exact, scale: float, zero_point: int, grid: Grid) -> float:
    """Mean squared error: of sampled `values` [any], plus that of the known extremes, each seen once at least."""
    error = float(np.square(values - fake_quantize(values, scale, zero_point, grid), dtype=np.float64).mean())
    below, above = scale * (grid.qmin - zero_point), scale * (grid.qmin + grid.levels - zero_point)
    cut = np.square(np.minimum(bounds.lo - below, 0), dtype=np.float64) + np.square(np.maximum(bounds.hi - above, 0))
    return error + float((cut.mean(axis=1) / bounds.tokens).mean())


def _halves(rows: Array, transform: Transform | None) -> tuple[Array, Array]:
    """Even and odd sampled rows [S, n, C], transformed, flattened and thinned; one row serves as both."""
    seen = rows if transform is None else transform(rows)
    halves = (seen[:, ::2], seen[:, 1::2] if seen.shape[1] > 1 else seen)
    first, second = (thin(half) for half in halves)
    return first, second


def thin(values: Array, most: int = SEARCH_VALUES) -> Array:
    """At most `most` of the values, flat, drawn without replacement; the same draw for the same size."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if flat.size <= most:
        return flat
    picked: Array = flat[np.random.default_rng(flat.size).choice(flat.size, most, replace=False, shuffle=False)]
    return picked


def _percentile(values: Array, lo: float, hi: float, percent: float) -> tuple[float, float]:
    low, high = np.percentile(values, [100.0 - percent, percent])
    return max(lo, min(float(low), 0.0)), min(hi, max(float(high), 0.0))


def _least_error(values: Array, bounds: Exact, lo: float, hi: float, grid: Grid) -> tuple[float, float]:
    """Shrink both ends together, then each alone, over three octaves and more; then refine around the best."""

    def error(ratios: tuple[float, float]) -> float:
        return clip_error(values, bounds, *affine(lo * ratios[0], hi * ratios[1], grid), grid)

    coarse = np.geomspace(1.0, 0.05, 12).tolist()
    best = min(((r, r) for r in coarse), key=error)
    best = min([best, *((r, best[1]) for r in coarse)], key=error)
    best = min([best, *((best[0], r) for r in coarse)], key=error)
    for factors in ((0.85, 0.92, 1.08, 1.15), (0.96, 1.04)):
        best = min([best, *((min(best[0] * f, 1.0), best[1]) for f in factors)], key=error)
        best = min([best, *((best[0], min(best[1] * f, 1.0)) for f in factors)], key=error)
    return lo * best[0], hi * best[1]
