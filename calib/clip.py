"""Clip ratios: how much of a value's range its quantizer covers in each bin, by the output error of its readers.

    error(ρ) = Σ_layers ‖X'W' − (Q_ρ(X')·Ŵ + X'·down·up)‖²        (timestep-wise clip search, SVDQuant-GPTQ for Wan2.2)

Legend: X' [n, K] transformed rows of one bin, W' [K, N] transformed weight, Ŵ the quantized residual W' − down·up, m
columns of the sketch. Ratio ρ shrinks both ends of a static range toward zero, or the extremes a run-time scale is
computed from; an `mx` exponent may also move by one.

ρ is searched on one half of the rows and taken only if it is better on the other half: equal rows, of which a value
that depends on the prompt alone has many, stay in one half. A range comes from all tokens, the rows are a sample: where
they do not reach an end of it, as many values may lie there as n rows can miss (a rate of 3 / n at 95 % confidence),
and clipping has to pay for those too. Otherwise a search on samples clips at 8 bits, where that costs decibels.

Speed: with X'(W' − down·up) known, a candidate costs Q(X')·Ŵ. Both are multiplied by a random sign matrix R [N, m] for
each layer and summed over the layers: the mean of ‖Σ E_i·R_i‖² is Σ ‖E_i‖², its relative standard deviation √(2/m) at
most (9 %), and common to all candidates, so that it hardly moves the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.ranges import GAIN, Grid, affine
from vdq_export.graph import Array
from vdq_export.plan import Dynamic, Range

TOKENS = 4096  # rows over all bins
SKETCH = 256
MISSED = 3.0  # values that n rows may have missed: with 3 / n of them a sample of n shows none in 5 % of cases
OFFSETS = (-1, 0, 1)
_FIXED = ("channel", "mxfp8", "nvfp4")  # kinds that know no ratio
_CHUNK = 256  # rows quantized at a time: they stay in cache

Branch = tuple[Array, Array] | None
Candidate = Range | Dynamic


class _Readers(NamedTuple):
    """The layers that read the value, sketched and summed: each [K, m]. residual: W' − down·up; quantized: Ŵ."""

    weight: Array
    residual: Array
    quantized: Array


class _Half(NamedTuple):
    """Rows [n, K] and what the quantized residual should give for them, [n, m]."""

    rows: Array
    wanted: Array


def search(
    rows: Sequence[Array],
    ranges: Sequence[Range],
    dynamic: Sequence[Dynamic],
    grid: Grid,
    weights: Sequence[Array],
    quantized: Sequence[Array],
    branches: Sequence[Branch],
    ratios: Sequence[float],
) -> tuple[tuple[Range, ...], tuple[Dynamic, ...]]:
    """(ranges, dynamic) with the best of `ratios`, or as they were where none gains on held-out rows.

    rows: float32 [n, K] for each bin, transformed; ranges, dynamic: one for each bin, one of both empty; weights W',
    quantized Ŵ, branches (down, up) or None: one for each layer. `channel` scales keep ratio 1: they are computed over
    a whole sample, which sampled rows are not; those of `mxfp8` and `nvfp4` are what a GPU makes of a block. No ratio
    below 1 tries none.
    """
    given: Sequence[Candidate] = ranges or dynamic
    tried = sorted({r for r in ratios if r < 1}, reverse=True)
    if not tried or all(isinstance(one, Dynamic) and one.kind in _FIXED for one in given):
        return tuple(ranges), tuple(dynamic)
    readers = _sketch(weights, quantized, branches)
    most = max(2, TOKENS // len(given))
    found = [_best(x[_evenly(len(x), most)], one, grid, readers, tried) for x, one in zip(rows, given, strict=True)]
    return (
        tuple(one for one in found if isinstance(one, Range)),
        tuple(one for one in found if isinstance(one, Dynamic)),
    )


def _best(rows: Array, given: Candidate, grid: Grid, readers: _Readers, ratios: Sequence[float]) -> Candidate:
    candidates = _candidates(given, ratios, grid)
    first, second = (_Half(half, half @ readers.residual) for half in _halves(rows))

    def error(half: _Half) -> Callable[[Candidate], float]:
        return lambda one: output_error(half, one, grid, readers.quantized) + _missed(half, given, one, readers)

    best = min([given, *candidates], key=error(first))
    power = float(np.square(second.rows @ readers.weight, dtype=np.float64).sum())
    if best is given or power <= 0:
        return replace(given, why=f"{given.why}; no clip ratio of {_listed(ratios)} gains")
    full, ours = error(second)(given), error(second)(best)
    numbers = f"held-out output error {ours / power:.2e} against {full / power:.2e}"
    if ours <= GAIN * full:
        return replace(best, why=f"{_described(best, given)} of {given.why}: {numbers}")
    return replace(given, why=f"{given.why}; {_described(best, given)} gains too little: {numbers}")


def output_error(half: _Half, one: Candidate, grid: Grid, quantized: Array) -> float:
    """‖wanted − Q(rows)·Ŵ‖²."""
    total = 0.0
    for start in range(0, len(half.rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        difference = quantize_rows(half.rows[part], one, grid) @ quantized
        difference -= half.wanted[part]
        total += float(np.square(difference, dtype=np.float64).sum())
    return total


def _missed(half: _Half, given: Candidate, one: Candidate, readers: _Readers) -> float:
    """Error that values between the rows' extremes and those of the range would add: as many as n rows can miss.

    They are assumed at the very end, in the channel that comes closest to it: outliers keep to their channels.
    """
    if isinstance(given, Dynamic) or isinstance(one, Dynamic):
        return 0.0
    total = 0.0
    for known, covered, extremes in (
        (given.hi, one.hi, half.rows.max(axis=0)),
        (-given.lo, -one.lo, -half.rows.min(axis=0)),
    ):
        channel = int(extremes.argmax())
        if extremes[channel] < known * (1 - 1e-6):  # float32 rows against a float range
            weight = float(np.square(readers.quantized[channel], dtype=np.float64).sum())
            total += MISSED * (known - covered) ** 2 * weight
    return total


def _candidates(given: Candidate, ratios: Sequence[float], grid: Grid) -> list[Candidate]:
    if isinstance(given, Dynamic):
        offsets = OFFSETS if given.kind == "mx" else (0,)
        pairs = [(r, o) for r in (1.0, *ratios) for o in offsets if (r, o) != (1.0, 0)]
        return [replace(given, ratio=given.ratio * r, offset=given.offset + o) for r, o in pairs]
    found: list[Candidate] = []
    for ratio in ratios:
        scale, zero = affine(given.lo * ratio, given.hi * ratio, grid)
        found.append(replace(given, lo=given.lo * ratio, hi=given.hi * ratio, scale=scale, zero_point=zero))
    return found


def _described(best: Candidate, given: Candidate) -> str:
    if isinstance(best, Dynamic) and isinstance(given, Dynamic):
        moved = best.offset - given.offset
        return f"clip ratio {best.ratio / given.ratio:g}" + (f", exponent {moved:+d}" if moved else "")
    assert isinstance(best, Range) and isinstance(given, Range)
    return f"clip ratio {(best.hi - best.lo) / (given.hi - given.lo):.3g}"


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{r:g}" for r in ratios)


def _sketch(weights: Sequence[Array], quantized: Sequence[Array], branches: Sequence[Branch]) -> _Readers:
    """Sums over the layers of W'·R, (W' − down·up)·R and Ŵ·R; few output channels are kept as they are."""
    width = sum(w.shape[1] for w in weights)
    signs = np.eye(width, dtype=np.float32)
    if width > SKETCH:
        drawn = np.random.default_rng(width).integers(0, 2, (width, SKETCH), dtype=np.int8)
        signs = (drawn.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(SKETCH))
    sums = [np.zeros((len(weights[0]), signs.shape[1]), np.float32) for _ in range(3)]
    start = 0
    for weight, rounded, branch in zip(weights, quantized, branches, strict=True):
        own = signs[start : start + weight.shape[1]]
        start += weight.shape[1]
        whole = weight @ own
        sums[0] += whole
        sums[1] += whole if branch is None else whole - branch[0] @ (branch[1] @ own)
        sums[2] += rounded @ own
    return _Readers(*sums)


def _halves(rows: Array) -> tuple[Array, Array]:
    """Every other different row; the one row of a value that has no second serves as both."""
    number: dict[bytes, int] = {}
    # A few channels tell rows apart; equal tokens are equal to the bit.
    odd = np.array([number.setdefault(row.tobytes(), len(number)) % 2 == 1 for row in rows[:, :16]])
    return (rows[~odd], rows[odd]) if odd.any() else (rows, rows)


def _evenly(size: int, most: int) -> Array:
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
