"""Quantizer ranges: uniform asymmetric per tensor for activations, symmetric per output channel for weights.

Legend: K input channels, N output channels, S slots, n sampled rows a slot. A grid of `bits` bits has levels
qmin … qmin + 2^bits − 1 of its integer type (so 6-bit values may live in an 8-bit type), and always holds zero exactly.

Exact minimum and maximum come from all tokens; the sampled rows only say where values are dense. A range narrower than
[min, max] is taken only if it is better on sampled rows it was not searched on, known extremes included: a search on a
sample alone cuts off what the sample happens to miss, which costs decibels at 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vdq_export.calib.record import ValueRecord
from vdq_export.graph import Array, release
from vdq_export.plan import INT_RANGE, IntType, Range
from vdq_export.recipe import ActivationRecipe

GAIN = 0.95  # a narrower range must have at most this share of the full range's error on held-out rows
SEARCH_VALUES = 1 << 15  # sampled values a search looks at
CHUNK_BYTES = 16 * 2**20
_TINY = float(np.finfo(np.float32).tiny)


class Grid(NamedTuple):
    """Where a quantizer's integers lie."""

    dtype: IntType
    bits: int

    @property
    def qmin(self) -> int:
        return INT_RANGE[self.dtype][0]

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest integer."""
        return int(2**self.bits - 1)


class Exact(NamedTuple):
    """Exact per-channel extremes of one value over the slots of a bin, after smoothing: lo, hi [S, C]; tokens [S]."""

    lo: Array
    hi: Array
    tokens: Array


# -- activations -----------------------------------------------------------------------------------------------------


def affine(lo: float, hi: float, grid: Grid) -> tuple[float, int]:
    """(scale, zero_point) of the grid over [min(lo, 0), max(hi, 0)].

    The scale is a float32 number. An empty range (all zeros, or too small for float32) gets scale 1.
    """
    low, high = min(lo, 0.0), max(hi, 0.0)
    scale = float(np.float32((high - low) / grid.levels))
    if scale < _TINY:
        return 1.0, grid.qmin
    zero = grid.qmin + round(-low / scale)
    return scale, min(max(zero, grid.qmin), grid.qmin + grid.levels)


def fake_quantize(x: Array, scale: float, zero_point: int, grid: Grid) -> Array:
    """x̂ = scale · (clip(round(x / scale) + z, qmin, qmin + levels) − z), in the dtype of x."""
    quotient: Array = np.rint(x / x.dtype.type(scale))
    np.clip(quotient, grid.qmin - zero_point, grid.qmin + grid.levels - zero_point, out=quotient)
    quotient *= x.dtype.type(scale)
    return quotient


def exact(value: ValueRecord, slots: Sequence[int], smoothing: Array | None = None) -> Exact:
    """Extremes of value / smoothing[C] over some slots; exact, because division by a positive number keeps order."""
    index = np.asarray(slots)
    lo, hi = value.lo[index], value.hi[index]
    if smoothing is not None:
        lo, hi = lo / smoothing, hi / smoothing
    return Exact(lo, hi, value.count[index])


def activation_range(
    value: ValueRecord, slots: Sequence[int], settings: ActivationRecipe, grid: Grid, smoothing: Array | None = None
) -> Range:
    """The range one bin gets: the method of the recipe, or the full range where that is no better on held-out rows."""
    bounds = exact(value, slots, smoothing)
    lo, hi = min(float(bounds.lo.min()), 0.0), max(float(bounds.hi.max()), 0.0)
    why = f"min and max of {int(bounds.tokens.sum())} rows"
    if settings.range != "minmax" and hi > lo:
        search, held_out = _halves(value.linear()[1][np.asarray(slots)], smoothing)
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


def _halves(rows: Array, smoothing: Array | None) -> tuple[Array, Array]:
    """Even and odd sampled rows [S, n, C], flattened and thinned; one row serves as both."""
    smooth = rows if smoothing is None else rows / smoothing
    halves = (smooth[:, ::2], smooth[:, 1::2] if smooth.shape[1] > 1 else smooth)
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


# -- weights ---------------------------------------------------------------------------------------------------------


def blocks(weight: Array, axis: int) -> Iterator[slice]:
    """Slices along `axis` of about CHUNK_BYTES each, so that a mapped weight is never in memory whole."""
    size = weight.shape[axis]
    step = max(1, int(CHUNK_BYTES // max(1, weight.nbytes // max(1, size))))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _tiles(weight: Array) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) blocks that lie together in memory; weights are often transposed views of a module's own."""
    across = weight.flags.f_contiguous and not weight.flags.c_contiguous
    for part in blocks(weight, 1 if across else 0):
        yield (slice(None), part) if across else (part, slice(None))
    release(weight)


def peaks(weight: Array, smoothing: Array | None = None) -> Array:
    """Largest |smoothing[k] · weight[k, n]| of each output channel, [N] float32."""
    highest = np.zeros(weight.shape[1], np.float32)
    for rows, columns in _tiles(weight):
        chunk = np.asarray(weight[rows, columns], np.float32)
        if smoothing is not None:
            chunk = chunk * smoothing[rows, None]
        highest[columns] = np.maximum(highest[columns], np.maximum(chunk.max(axis=0), -chunk.min(axis=0)))
    return highest


def row_peaks(weight: Array) -> Array:
    """Largest |weight[k, n]| of each input channel, [K] float32."""
    highest = np.zeros(weight.shape[0], np.float32)
    for rows, columns in _tiles(weight):
        chunk = np.asarray(weight[rows, columns], np.float32)
        highest[rows] = np.maximum(highest[rows], np.maximum(chunk.max(axis=1), -chunk.min(axis=1)))
    return highest


def weight_scale(weight: Array, qmax: int, smoothing: Array | None = None, method: str = "minmax") -> Array:
    """Scale [N] of a symmetric grid −qmax … qmax for each output channel of smoothing[:, None] · weight.

    `minmax` covers the largest magnitude; `mse` narrows it to the least squared error over the channel (all rows).
    A channel of zeros gets scale 1.
    """
    highest = peaks(weight, smoothing)
    if method == "mse":
        for part in blocks(weight, 1):
            chunk = np.asarray(weight[:, part], np.float32)
            highest[part] *= _best_ratio(
                chunk if smoothing is None else chunk * smoothing[:, None], highest[part], qmax
            )
    scale = highest / np.float32(qmax)
    return np.where(scale < _TINY, np.float32(1.0), scale).astype(np.float32)


def quantize_weight(weight: Array, scale: Array, qmax: int) -> Array:
    """ŵ on the grid of scale[N], in float32."""
    quotient: Array = np.rint(weight / scale)
    np.clip(quotient, -qmax, qmax, out=quotient)
    quotient *= scale
    return quotient


def _best_ratio(weight: Array, highest: Array, qmax: int) -> Array:
    """Share of `highest` [N] with the least squared error a channel: seven coarse steps, then six around the best."""
    best, least = np.ones_like(highest), np.full(highest.shape, np.inf)

    def attempt(ratio: Array) -> None:
        scale = np.maximum(ratio * highest / np.float32(qmax), np.float32(_TINY))
        error = quantize_weight(weight, scale, qmax)
        error -= weight
        squared = np.einsum("kn,kn->n", error, error)
        better = squared < least
        best[better], least[better] = ratio[better], squared[better]

    for coarse in np.linspace(1.0, 0.4, 7, dtype=np.float32):
        attempt(np.full_like(highest, coarse))
    centre = best.copy()
    for fine in np.array([-0.075, -0.05, -0.025, 0.025, 0.05, 0.075], np.float32):
        attempt(np.minimum(centre + fine, np.float32(1.0)))
    return best
