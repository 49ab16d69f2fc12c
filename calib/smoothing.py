"""Aggregated smooth quantization (ASQ): one scale vector a value for all timesteps.

    y = X · W = (X / s) · (s · W),      s_c = a_c^α / w_c^(1−α)

X [tokens, K], W [K, N] of all layers that read the value side by side (q, k, v share one s), w_c = max_n |W[c, n]|,
a_c = running average with momentum over the calibration batches of the batch mean of max_tokens |X[:, c]|. A batch is
one slot of the record: the calls of all samples at one timestep and branch, in denoising order.

A common factor of s cancels (scales absorb it), so s is normalised to geometric mean 1: the folded vectors keep the
size they had. A dead channel (a_c or w_c zero) gets 1, less or more where it would otherwise widen the weight's or the
activation's range.

`alpha = "search"` measures, on sampled rows, the output error with the per-bin ranges and the weight grid that will be
used, for α = 0.1 … 1.0 and for no smoothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vdq_export.calib import weight_ranges
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.ranges import Grid, activation_range, affine, fake_quantize
from vdq_export.calib.record import ValueRecord
from vdq_export.calib.weight_ranges import Method, row_peaks
from vdq_export.graph import Array
from vdq_export.plan import Smoothing
from vdq_export.recipe import ActivationRecipe, SmoothingRecipe

Quantizer = Callable[[Array], tuple[float, int]]  # smoothing s [K] -> (scale, zero_point)
ALPHAS = tuple(k / 10 for k in range(1, 11))
GAIN = 0.98  # smoothing must bring the error below this share: an unsmoothed value costs nothing to run
SILENT = 1e-30  # a channel that never rises above this is dead: its scale would leave float32
SEARCH_ROWS = 128
SEARCH_COLUMNS = 256


@dataclass(frozen=True)
class Group:
    """The quantized layers that read one value; they share activation ranges and smoothing."""

    value: ValueRecord
    names: tuple[str, ...]
    weights: tuple[Array, ...]  # [K, N] each
    grid: Grid
    qmax: int


@dataclass(frozen=True)
class Choice:
    """Smoothing of one group, or None, and why."""

    smoothing: Smoothing | None
    why: str

    @property
    def scale(self) -> Array | None:
        return None if self.smoothing is None else np.array(self.smoothing.scale, np.float32)


def activation_peaks(value: ValueRecord, momentum: float) -> Array:
    """a [K]: running average over the slots, a ← m·a + (1 − m)·peak, starting from the first slot."""
    peak, _ = value.linear()
    average: Array = peak[0].astype(np.float64)
    for batch in peak[1:]:
        average = momentum * average + (1.0 - momentum) * batch
    return average


def scales(activation: Array, weight: Array, alpha: float) -> Array:
    """s [K] float32 from a [K] and w [K]; geometric mean 1 over the live channels."""
    a, w = (np.where(peak < SILENT, 0.0, peak.astype(np.float64)) for peak in (activation, weight))
    live = (a > 0) & (w > 0)
    s = np.ones_like(a)
    if not live.any():
        return s.astype(np.float32)
    logs = alpha * np.log(a[live]) - (1.0 - alpha) * np.log(w[live])
    s[live] = np.exp(np.clip(logs - logs.mean(), -40.0, 40.0))
    silent = (a <= 0) & (w > 0)  # s·w must stay below the largest of the live channels
    s[silent] = np.minimum(1.0, (s * w)[live].max() / w[silent])
    unread = (a > 0) & (w <= 0)  # a/s likewise
    s[unread] = np.maximum(1.0, a[unread] / (a / s)[live].max())
    return s.astype(np.float32)


def choose(
    groups: Sequence[Group],
    settings: SmoothingRecipe,
    activations: ActivationRecipe,
    weights: Method,
    bins: Sequence[Sequence[int]],
) -> list[Choice]:
    """Smoothing of every group. `bins`: slots of each (provisional) bin; `weights`: method of the weight range."""
    if settings.kind == "none" or not groups:
        return [Choice(None, "the recipe smooths nothing") for _ in groups]
    peaks = [(activation_peaks(g.value, settings.momentum), _joint_peaks(g.weights)) for g in groups]
    if settings.alpha != "search":
        return [_choice(*p, settings.alpha, f"alpha {settings.alpha:g} fixed by the recipe") for p in peaks]
    errors = np.array([_errors(g, p, activations, weights, bins) for g, p in zip(groups, peaks, strict=True)])
    if settings.scope == "global":
        alpha, why = _pick(errors.mean(axis=0), "mean output error")
        return [_choice(*p, alpha, f"{why} over {len(groups)} values") for p in peaks]
    picks = [_pick(e, "output error") for e in errors]
    return [_choice(*p, *pick) for p, pick in zip(peaks, picks, strict=True)]


def _choice(activation: Array, weight: Array, alpha: float | None, why: str) -> Choice:
    if alpha is None:
        return Choice(None, why)
    return Choice(Smoothing(alpha=alpha, scale=tuple(scales(activation, weight, alpha).tolist()), why=why), why)


def _pick(errors: Array, what: str) -> tuple[float | None, str]:
    """The best alpha, or None; errors [1 + alphas], unsmoothed first."""
    best = int(errors[1:].argmin())
    bare, smooth = f"{errors[0]:.2e}", f"{errors[1 + best]:.2e}"
    if errors[1 + best] < GAIN * errors[0]:
        why = f"alpha {ALPHAS[best]:g} of {len(errors)} candidates: {what} {smooth} against {bare} unsmoothed"
        return ALPHAS[best], why
    return None, f"unsmoothed of {len(errors)} candidates: {what} {bare}; best alpha {ALPHAS[best]:g}: {smooth}"


def _joint_peaks(weights: Sequence[Array]) -> Array:
    joint: Array = np.max(np.stack([row_peaks(w) for w in weights]), axis=0)
    return joint


def _errors(
    group: Group,
    peaks: tuple[Array, Array],
    activations: ActivationRecipe,
    weights: Method,
    bins: Sequence[Sequence[int]],
) -> list[float]:
    """Relative output error ‖X̂Ŵ − XW‖² / ‖XW‖² unsmoothed, then for each alpha."""
    columns = np.concatenate(
        [_few_columns(w, max(1, SEARCH_COLUMNS // len(group.weights))) for w in group.weights], axis=1
    )
    known, trials = _trials(group, peaks[0], activations, bins)
    wanted = np.concatenate([rows for rows, _ in trials]) @ columns
    power = float(np.square(wanted, dtype=np.float64).sum())
    if power <= 0:
        return [0.0] * (1 + len(ALPHAS))
    found = []
    for alpha in (None, *ALPHAS):
        s = np.ones(len(columns), np.float32) if alpha is None else scales(known, peaks[1], alpha)
        quantized = [fake_quantize(rows / s, *quantizer(s), group.grid) for rows, quantizer in trials]
        smooth = columns * s[:, None]
        fmt = WeightFormat("int8", 8, group.qmax)
        scale = weight_ranges.scales(smooth, fmt, weights)
        grid = weight_ranges.dequantize(weight_ranges.quantize(smooth, scale, fmt), scale, fmt)
        error = np.concatenate(quantized) @ grid - wanted
        found.append(float(np.square(error, dtype=np.float64).sum()) / power)
    return found


def _trials(
    group: Group, peaks: Array, activations: ActivationRecipe, bins: Sequence[Sequence[int]]
) -> tuple[Array, list[tuple[Array, Quantizer]]]:
    """(activation peaks [K] to smooth by; rows to measure on, each set with the quantizer it would get).

    As a rule the sampled rows of every bin, under the bin's range. A value with few different tokens is measured on
    half of them, with peaks and range of the other half: the extremes of a few prompts are not those of the next.
    """
    tokens = _distinct_tokens(group.value)
    if tokens is not None:
        known = tokens[0::2]
        return np.abs(known).max(axis=0), [
            (tokens[1::2], lambda s: affine(float((known / s).min()), float((known / s).max()), group.grid))
        ]

    def quantizer(slots: Sequence[int], s: Array) -> tuple[float, int]:
        one = activation_range(group.value, slots, activations, group.grid, s)
        return one.scale, one.zero_point

    most = max(1, SEARCH_ROWS // len(bins))
    return peaks, [(_few_rows(group.value, slots, most), partial(quantizer, slots)) for slots in bins]


def _distinct_tokens(value: ValueRecord) -> Array | None:
    """The different sampled rows of a value that shows the same few at every timestep (it depends on the prompt only).

    [n, K], or None where most sampled rows differ: such a value has been seen in all its variety.
    """
    _, rows = value.linear()
    flat = rows.reshape(-1, rows.shape[-1])
    # A few channels tell rows apart; equal tokens are equal to the bit, they come from the same kernels.
    first = {row.tobytes(): index for index, row in reversed(list(enumerate(flat[:, :16])))}
    return flat[sorted(first.values())] if 2 <= len(first) <= len(flat) // 2 else None


def _few_rows(value: ValueRecord, slots: Sequence[int], most: int) -> Array:
    """Up to `most` sampled rows of a bin, evenly over its slots; [rows, K]."""
    _, rows = value.linear()
    flat = rows[np.asarray(slots)].reshape(-1, rows.shape[-1])
    picked: Array = flat[_evenly(len(flat), most)]
    return picked


def _few_columns(weight: Array, most: int) -> Array:
    return np.asarray(weight[:, _evenly(weight.shape[1], most)], np.float32)


def _evenly(size: int, most: int) -> Array:
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
