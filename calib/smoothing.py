"""Channel scales that are folded into weights: smoothing before a rotation, static ARQ after it.

    y = X · W = (X / s) · (s · W),      s_c = a_c^α / w_c^(1−α)

Legend: X [tokens, K], W [K, N] of all layers that read the value side by side (q, k, v share one s), B bins,
w_c = max_n |W[c, n]|, a_c = the activation's peak, for which the kinds differ:

- absmax: the largest |X[:, c]| calibration saw (SmoothQuant).
- asq: running average with momentum over the calibration batches of the batch mean of max_tokens |X[:, c]|. A batch is
  one slot of the record: the calls of all samples at one timestep and branch, in denoising order.
- tsq: the same over the slots of one bin, for weights of its own. With `shared`, one vector for all bins: the rank-1
  fit log a_bc ≈ log σ_b + log a_c with least squares, a_c = geometric mean over the bins. The vector of bin b then is
  σ'_b · s, σ'_b = σ_b^α, and its scalar needs no place in the graph: with grid step Δ and zero point z,
      q = clip(round(x / (σ'·s) / Δ) + z) = clip(round(x / s / (σ'·Δ)) + z)
      y = Δ · (q − z) · (σ'·s·W)          = (σ'·Δ) · (q − z) · (s·W)
  so it is part of the bin's static range of x / s, whose minimum and maximum are σ' times as large.

A common factor of s cancels (scales absorb it), so s is normalised to geometric mean 1: the folded vectors keep the
size they had. A dead channel (a_c or w_c zero) gets 1, less or more where it would otherwise widen the weight's or the
activation's range.

ARQ (DVD-Quant) divides the rotated activation X·H by the magnitude of each of its channels, computed online. Integer
matmuls cannot take a scale per input channel out again, so its static form c ∝ peak^α of each channel of the
calibrated (X/s)·H goes into the weight: (X/s)·H/c · c·Hᵀ·(s·W). That can cost more in the weight than it gains.
Where channels differ by chance alone, part of the gain at 4 bits is that of a narrower range, which clipping has too.

`alpha = "search"` measures, on sampled rows, the output error with the per-bin ranges and the weight grid that will be
used, for α = 0.1 … 1.0 and for no scale at all; after_rotation() always does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace as with_fields

from vdq_export.calib import weight_ranges
from vdq_export.calib.dynamic import online, quantize_rows
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.ranges import Grid, activation_range, affine
from vdq_export.calib.record import ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.calib.weight_ranges import Method, row_peaks
from vdq_export.graph import Array
from vdq_export.plan import MX_BLOCK, Dynamic, Range, Rotation, Smoothing
from vdq_export.recipe import ActivationRecipe, SmoothingRecipe

ALPHAS = tuple(k / 10 for k in range(1, 11))
GAIN = 0.98  # a scale must bring the error below this share: without one a value costs nothing to run
SILENT = 1e-30  # a channel that never rises above this is dead: its scale would leave float32
SEARCH_ROWS = 128
SEARCH_COLUMNS = 256

Bins = Sequence[Sequence[int]]  # slots of each bin


@dataclass(frozen=True)
class Group:
    """The quantized layers that read one value; they share activation ranges, smoothing and rotation."""

    value: ValueRecord
    names: tuple[str, ...]
    weights: Sequence[Array]  # [K, N] each
    grid: Grid
    format: WeightFormat


@dataclass(frozen=True)
class Choice:
    """Smoothing of one group, or None, and why."""

    smoothing: Smoothing | None
    why: str

    @property
    def scale(self) -> Array | None:
        return None if self.smoothing is None else np.array(self.smoothing.scale, np.float32)


class RankOne(NamedTuple):
    """peaks[b, c] ≈ scalars[b] · vector[c]; residual: root mean square of what the fit leaves of log(peaks)."""

    vector: Array
    scalars: Array
    residual: float


class _Peaks(NamedTuple):
    """a [K] and w [K] of one group; note: what there is to say about a."""

    activation: Array
    weight: Array
    note: str = ""


class _Trial(NamedTuple):
    """Rows [n, K] to measure on, and the quantizer they get once transformed."""

    rows: Array
    quantizer: Callable[[Transform], Range | Dynamic]


def choose(
    groups: Sequence[Group],
    settings: SmoothingRecipe,
    activations: ActivationRecipe,
    weights: Method,
    bins: Bins,
    rotations: Sequence[Rotation | None] = (),
) -> list[Choice]:
    """Smoothing of every group, from the slots of `bins` (provisional ones; for own weights a bin: that bin alone).

    weights: method of the weight range. rotations: of each group, where a rotation will follow that a search of alpha
    should count in.
    """
    if settings.kind == "none" or not groups:
        return [Choice(None, "the recipe smooths nothing") for _ in groups]
    peaks = [_peaks(g, settings, bins) for g in groups]
    if settings.alpha != "search":
        return [_choice(p, settings.alpha, f"alpha {settings.alpha:g} fixed by the recipe") for p in peaks]
    turns = rotations or [None] * len(groups)
    errors = np.array(
        [
            _errors(g, partial(_smoothings, p, turn), activations, weights, bins)
            for g, p, turn in zip(groups, peaks, turns, strict=True)
        ]
    )
    if settings.scope == "global":
        alpha, why = _pick(errors.mean(axis=0), "mean output error", "unsmoothed")
        return [_choice(p, alpha, f"{why} over {len(groups)} values") for p in peaks]
    picks = [_pick(e, "output error", "unsmoothed") for e in errors]
    return [_choice(p, *pick) for p, pick in zip(peaks, picks, strict=True)]


def output_errors(
    group: Group, transforms: Sequence[Transform], activations: ActivationRecipe, weights: Method, bins: Bins
) -> list[float]:
    """Relative output error of the layers of `group` under each transform."""
    return _errors(group, lambda _: transforms, activations, weights, bins)


def after_rotation(
    group: Group, transform: Transform, activations: ActivationRecipe, weights: Method, bins: Bins
) -> tuple[Array | None, str]:
    """(c [K] float32 of geometric mean 1, or None; why): the static scale ARQ gets after `transform`, which rotates.

    Chosen by output error among peak^α for α = 0.1 … 1.0 and none, with peaks and ranges of other rows than those
    measured: the record has no exact peaks of rotated channels, and those of the very rows would gain on them always.
    """
    slots = sorted({slot for one in bins for slot in one})
    rows = transform(group.value.sample(slots, top=True))
    peaks = np.abs(rows).max(axis=0)

    def candidates(known: Array | None) -> list[Transform]:
        own = peaks if known is None else np.abs(transform(known)).max(axis=0)
        return [transform, *(_scaled(transform, _after(own, alpha)) for alpha in ALPHAS)]

    errors = np.array(_errors(group, candidates, activations, weights, bins, held_out=True))
    alpha, why = _pick(errors, "held-out output error", "unscaled")
    return (None if alpha is None else _after(peaks, alpha)), f"channel scale after the rotation: {why}"


# -- the vectors -----------------------------------------------------------------------------------------------------


def activation_peaks(value: ValueRecord, settings: SmoothingRecipe, bins: Bins) -> Array:
    """a [K], as the recipe's kind has it, over the slots of `bins`."""
    if settings.kind == "tsq" and settings.shared:
        return rank_one([running_average(value, one, settings.momentum) for one in bins]).vector
    every = sorted({slot for one in bins for slot in one})
    if settings.kind == "absmax":
        largest: Array = np.maximum(value.hi[every], -value.lo[every]).max(axis=0)
        return largest
    return running_average(value, every, settings.momentum)


def running_average(value: ValueRecord, slots: Sequence[int], momentum: float) -> Array:
    """Of the slots' peaks [K] in denoising order: a ← m·a + (1 − m)·peak, starting from the first."""
    peak, _ = value.linear()
    average: Array = peak[slots[0]].astype(np.float64)
    for slot in slots[1:]:
        average = momentum * average + (1.0 - momentum) * peak[slot]
    return average


def rank_one(peaks: Sequence[Array]) -> RankOne:
    """Least-squares fit of log(peaks[b, c]); a channel that is dead in some bins counts in the others alone."""
    table = np.stack(peaks).astype(np.float64)
    live = table > SILENT
    logs = np.log(np.where(live, table, 1.0))
    vector = np.where(live.any(axis=0), np.exp(logs.sum(axis=0) / np.maximum(live.sum(axis=0), 1)), 0.0)
    full = live.all(axis=0)
    if not full.any():
        return RankOne(vector, np.ones(len(table)), 0.0)
    rest = logs[:, full] - logs[:, full].mean(axis=0)
    scalars = rest.mean(axis=1)
    residual = float(np.sqrt(np.square(rest - scalars[:, None]).mean()))
    return RankOne(vector, np.exp(scalars), residual)


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


def _after(peaks: Array, alpha: float) -> Array:
    """c [K] float32: peaks^alpha, geometric mean 1."""
    return scales(peaks, np.ones_like(peaks), alpha)


def _peaks(group: Group, settings: SmoothingRecipe, bins: Bins) -> _Peaks:
    weight = np.max(np.stack([row_peaks(w) for w in group.weights]), axis=0)
    note = ""
    if settings.kind == "tsq" and settings.shared and len(bins) > 1:
        fit = rank_one([running_average(group.value, one, settings.momentum) for one in bins])
        note = (
            f"; one vector for {len(bins)} bins, whose ranges absorb factors of {fit.scalars.min():.3g} to "
            f"{fit.scalars.max():.3g}; their peaks differ from it by {np.expm1(fit.residual):.1%} (rms)"
        )
    return _Peaks(activation_peaks(group.value, settings, bins), weight, note)


def _choice(peaks: _Peaks, alpha: float | None, why: str) -> Choice:
    if alpha is None:
        return Choice(None, why)
    made = scales(peaks.activation, peaks.weight, alpha)
    why += peaks.note
    return Choice(Smoothing(alpha=alpha, scale=tuple(made.tolist()), why=why), why)


def _smoothings(peaks: _Peaks, turn: Rotation | None, known: Array | None) -> list[Transform]:
    """Without smoothing, then with each alpha. known: rows [n, K] to take peaks from instead."""
    activation = peaks.activation if known is None else np.abs(known).max(axis=0)
    every = [scales(activation, peaks.weight, alpha) for alpha in ALPHAS]
    smooth = [Smoothing(alpha=a, scale=tuple(s.tolist()), why="") for a, s in zip(ALPHAS, every, strict=True)]
    return [Transform(one, turn) for one in (None, *smooth)]


def _scaled(transform: Transform, scale: Array) -> Transform:
    assert transform.rotation is not None
    return replace(transform, rotation=with_fields(transform.rotation, scale=tuple(scale.tolist())))


# -- the search ------------------------------------------------------------------------------------------------------


def _pick(errors: Array, what: str, without: str) -> tuple[float | None, str]:
    """The best alpha, or None; errors [1 + alphas], without a scale first."""
    best = int(errors[1:].argmin())
    bare, scaled = f"{errors[0]:.2e}", f"{errors[1 + best]:.2e}"
    if errors[1 + best] < GAIN * errors[0]:
        why = f"alpha {ALPHAS[best]:g} of {len(errors)} candidates: {what} {scaled} against {bare} {without}"
        return ALPHAS[best], why
    return None, f"{without} of {len(errors)} candidates: {what} {bare}; best alpha {ALPHAS[best]:g}: {scaled}"


def _errors(
    group: Group,
    candidates: Callable[[Array | None], Sequence[Transform]],
    activations: ActivationRecipe,
    weights: Method,
    bins: Bins,
    held_out: bool = False,
) -> list[float]:
    """Relative output error ‖X̂'Ŵ' − XW‖² / ‖XW‖² of each candidate.

    candidates(known): made of all there is to know, or of the rows [n, K] `known` alone.
    """
    most = max(1, SEARCH_COLUMNS // len(group.weights))
    columns = np.concatenate([_few_columns(w, most) for w in group.weights], axis=1)
    known, trials = _trials(group, activations, bins, held_out)
    wanted = np.concatenate([one.rows for one in trials]) @ columns
    power = float(np.square(wanted, dtype=np.float64).sum())
    found = []
    for transform in candidates(known):
        if power <= 0:
            found.append(0.0)
            continue
        rows = [quantize_rows(transform(one.rows), one.quantizer(transform), group.grid) for one in trials]
        error = np.concatenate(rows) @ _rounded(transform.weight(columns), group.format, weights) - wanted
        found.append(float(np.square(error, dtype=np.float64).sum()) / power)
    return found


def _rounded(weight: Array, fmt: WeightFormat, method: Method) -> Array:
    fmt = fmt._replace(group=0) if fmt.group and len(weight) % fmt.group else fmt
    scale = weight_ranges.scales(weight, fmt, method)
    return weight_ranges.dequantize(weight_ranges.quantize(weight, scale, fmt), scale, fmt)


def _trials(
    group: Group, activations: ActivationRecipe, bins: Bins, held_out: bool
) -> tuple[Array | None, list[_Trial]]:
    """(rows that candidates are to be made of, or None for all there is; rows to measure on).

    As a rule the sampled rows of every bin, under the bin's range. A value with few different tokens is measured on
    half of them, with peaks and range of the other half: the extremes of a few prompts are not those of the next.
    `held_out` treats every value so, bin by bin; rows of largest norm then are known.
    """
    tokens = _distinct_tokens(group.value)

    def of_rows(known: Array, transform: Transform) -> Range | Dynamic:
        seen = transform(known)
        lo, hi = float(seen.min()), float(seen.max())
        scale, zero = affine(lo, hi, group.grid)
        return chosen(Range(lo=lo, hi=hi, scale=scale, zero_point=zero, why=""))

    def of_bin(slots: Sequence[int], transform: Transform) -> Range | Dynamic:
        return chosen(activation_range(group.value, slots, activations, group.grid, transform))

    def chosen(known: Range) -> Range | Dynamic:
        # Widths that do not divide into the format's blocks are refused later; here any quantizer will do.
        fits = group.value.channels % MX_BLOCK == 0 or activations.granularity != "tensor"
        return (online(activations, known) if fits else None) or known

    if tokens is not None:
        return tokens[0::2], [_Trial(tokens[1::2], partial(of_rows, tokens[0::2]))]
    most = max(1, SEARCH_ROWS // len(bins))
    if held_out:
        known = [_known(group.value, slots) for slots in bins]
        rows = [group.value.sample(slots)[1::2] for slots in bins]
        trials = [_Trial(x[_evenly(len(x), most)], partial(of_rows, k)) for x, k in zip(rows, known, strict=True)]
        return np.concatenate(known), trials
    return None, [_Trial(_few_rows(group.value, slots, most), partial(of_bin, slots)) for slots in bins]


def _known(value: ValueRecord, slots: Sequence[int]) -> Array:
    """Every other sampled row of a bin and its rows of largest norm, [rows, K]."""
    half = value.sample(slots)[0::2]
    return half if value.top is None else np.concatenate([half, value.top[list(slots)].reshape(-1, half.shape[1])])


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
    flat = value.sample(slots)
    picked: Array = flat[_evenly(len(flat), most)]
    return picked


def _few_columns(weight: Array, most: int) -> Array:
    return np.asarray(weight[:, _evenly(weight.shape[1], most)], np.float32)


def _evenly(size: int, most: int) -> Array:
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
