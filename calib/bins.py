"""Timestep bins: which denoising steps share one set of activation parameters.

Legend: S steps (distinct timesteps, descending), [i, j] a run of steps, both ends included. A *partition* lists the
first step of each bin. The objective of a partition is the sum over its bins [i, j] of

    cost[i, j] = Σ_tensors Σ_{t in i..j} E_t‖x − Q_ij(x)‖² / E_t‖x‖²        (E_t: over the sampled rows of timestep t)

where Q_ij is the min-max quantizer of the run: each step counts by what it loses of its own signal. A step whose
signal is more than 20 dB below the tensor's mean counts as if it were 20 dB below, so that a value that is almost
silent at some steps does not decide alone. Zero lies on every grid, so as long as nothing is clipped (min-max
clips nothing) the error of a timestep depends on the grid's step Δ alone. It is measured on the sampled rows for a
dozen Δ between the smallest and the largest any run gets, and interpolated in log Δ, log error. Recipes that clip
(percentile, mse) refine ranges inside the bins chosen so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from msgspec.structs import replace

from vdq_export.calib.ranges import Grid, exact, thin
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.errors import RecipeError
from vdq_export.graph import Array
from vdq_export.plan import Bin, Branch

AUTO_GAIN = 0.9  # `auto`: fewest bins that bring this share of what one bin a step gains over one bin …
AUTO_SLACK = 0.05  # … or come within this share of its error
QUIET = 0.01  # power below which a step no longer counts more, against the tensor's mean
CURVE_POINTS = 12
CURVE_VALUES = 4096  # sampled values a slot
_LEAST = 1e-30
ANY_TIMESTEP = (-1e6, 1e6)  # samplers count to 1000, or to 1

Tsw = int | Literal["auto", "all"] | tuple[float, ...]  # a tuple: edges, as shares of the steps


@dataclass(frozen=True)
class Watched:
    """A value that will be quantized, as bins see it: its grid and, where it has one, its transform."""

    value: ValueRecord
    grid: Grid
    transform: Transform | None = None


def choose(
    record: CalibrationRecord, watched: Sequence[Watched], tsw: Tsw, *, optimal: bool = False, per_branch: bool = False
) -> tuple[tuple[Bin, ...], str]:
    """(bins in denoising order, why). With `per_branch`, each branch of the record gets `tsw` bins of its own.

    Raises RecipeError for fewer than one bin or more bins than steps.
    """
    branches: list[Branch] = sorted({s.branch for s in record.slots}) if per_branch else ["any"]
    bins: list[Bin] = []
    reasons = []
    for branch in branches:
        slots = [i for i, s in enumerate(record.slots) if branch in ("any", s.branch)]
        steps = sorted({record.slots[i].t for i in slots}, reverse=True)
        starts, why = partition(steps, record.slots, slots, watched, tsw, optimal)
        bins += make_bins(steps, starts, branch, first=len(bins))
        reasons.append(why if branch == "any" else f"{branch}: {why}")
    return tuple(bins), "; ".join(reasons)


def whole(record: CalibrationRecord) -> tuple[tuple[Bin, ...], str]:
    """(one bin for every timestep and branch there may be, why), of a record without data."""
    return (Bin(index=0, t=ANY_TIMESTEP, steps=record.steps),), "no quantizer depends on the timestep"


def partition(
    steps: Sequence[float],
    slots: Sequence[Slot],
    use: Sequence[int],
    watched: Sequence[Watched],
    tsw: Tsw,
    optimal: bool,
) -> tuple[list[int], str]:
    """(partition, why) of `steps`, looking at the slots numbered in `use`."""
    check_count(tsw, len(steps))
    if tsw == "all":
        return list(range(len(steps))), f"one bin for each of {len(steps)} steps"
    if isinstance(tsw, tuple):
        return cut(
            len(steps), tsw
        ), f"{len(tsw) + 1} ranges cut at {', '.join(f'{c:g}' for c in tsw)} of {len(steps)} steps"
    if tsw != "auto" and not optimal:
        return even(len(steps), tsw), f"{tsw} even ranges over {len(steps)} steps"
    cost = cost_table(steps, slots, use, watched)
    best = optimal_partitions(cost)
    finest = objective(cost, best[-1])
    if tsw == "auto":
        enough = finest + max(AUTO_SLACK * finest, (1 - AUTO_GAIN) * (objective(cost, best[0]) - finest))
        starts = next(s for s in best if objective(cost, s) <= enough)
        rule = f"auto: {len(starts)} is the fewest bins with {AUTO_GAIN:.0%} of the gain of one bin a step"
    else:
        starts = best[tsw - 1]
        rule = f"{tsw} bins with the least error"
    against = objective(cost, even(len(steps), len(starts)))
    return starts, (
        f"{rule} (relative error summed over {len(watched)} values, {len(use)} timesteps: "
        f"{objective(cost, starts):.3g}; even edges {against:.3g}, one bin {cost[0, -1]:.3g}, "
        f"one bin a step {finest:.3g})"
    )


def check_count(tsw: Tsw, steps: int | None = None) -> None:
    """Raise RecipeError for a number of bins that cannot be; `steps` None while it is not known how many there are."""
    if isinstance(tsw, str):
        if tsw not in ("auto", "all"):
            raise RecipeError(f"--tsw {tsw}: not a number of time ranges", hint="give a number, auto or all")
    elif isinstance(tsw, tuple):
        if list(tsw) != sorted(set(tsw)) or not all(0.0 < share < 1.0 for share in tsw):
            raise RecipeError(f"tsw = {list(tsw)}: edges are ascending shares of the steps, between 0 and 1")
        check_count(len(tsw) + 1, steps)
    elif tsw < 1:
        most = f"to {steps}" if steps else "or more"
        raise RecipeError(f"--tsw {tsw}: at least one time range is needed", hint=f"choose 1 {most}, auto or all")
    elif steps is not None and tsw > steps:
        raise RecipeError(
            f"--tsw {tsw}: more time ranges than the {steps} calibrated steps", hint=f"choose 1 to {steps}"
        )


def even(steps: int, count: int) -> list[int]:
    """`count` runs whose lengths differ by one step at most."""
    return [(steps * k) // count for k in range(count)]


def cut(steps: int, cuts: Sequence[float]) -> list[int]:
    """Runs that end at these shares of the steps, rounded; each has one step at least."""
    starts = [0]
    for share in cuts:
        starts.append(min(max(round(share * steps), starts[-1] + 1), steps - len(cuts) + len(starts) - 1))
    return starts


def make_bins(steps: Sequence[float], starts: Sequence[int], branch: Branch = "any", first: int = 0) -> list[Bin]:
    """Contiguous bins; an edge lies midway between the steps it parts, the outer ends are the outermost steps."""
    ends = [*starts[1:], len(steps)]
    bins = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        hi = steps[0] if start == 0 else (steps[start - 1] + steps[start]) / 2
        lo = steps[-1] if end == len(steps) else (steps[end - 1] + steps[end]) / 2
        bins.append(Bin(index=first + index, t=(lo, hi), steps=tuple(steps[start:end]), branch=branch))
    return bins


def place(bins: Sequence[Bin], expert: str, limits: tuple[float | None, float | None], first: int) -> tuple[Bin, ...]:
    """`bins` of one expert, numbered from `first`; its outermost ones reach to the limits where other experts begin."""
    lo, hi = limits
    lowest, highest = min(one.t[0] for one in bins), max(one.t[1] for one in bins)
    placed = []
    for number, one in enumerate(bins, first):
        t = (
            lo if lo is not None and one.t[0] == lowest else one.t[0],
            hi if hi is not None and one.t[1] == highest else one.t[1],
        )
        placed.append(replace(one, index=number, expert=expert, t=t))
    return tuple(placed)


def bin_slots(one: Bin, slots: Sequence[Slot]) -> list[int]:
    """Numbers of the slots a bin covers."""
    inside = set(one.steps)
    return [i for i, s in enumerate(slots) if s.t in inside and one.branch in ("any", s.branch)]


# -- the objective ---------------------------------------------------------------------------------------------------


def cost_table(steps: Sequence[float], slots: Sequence[Slot], use: Sequence[int], watched: Sequence[Watched]) -> Array:
    """cost[i, j] for i ≤ j, [S, S]; infinite below the diagonal."""
    at = {t: k for k, t in enumerate(steps)}
    step_of = np.array([at[slots[i].t] for i in use])
    total = np.zeros((len(steps), len(steps)))
    for one in watched:
        total += _value_cost(one, np.asarray(use), step_of, len(steps))
    total[np.tril_indices(len(steps), -1)] = np.inf
    return total


def objective(cost: Array, starts: Sequence[int]) -> float:
    """Sum of cost over the bins of a partition."""
    ends = [*starts[1:], len(cost)]
    return float(sum(cost[i, j - 1] for i, j in zip(starts, ends, strict=True)))


def optimal_partitions(cost: Array) -> list[list[int]]:
    """The partition with the least objective for every number of bins 1 … S. Dynamic programming, S² operations a bin.

    best[n][j] = min over i of best[n−1][i−1] + cost[i, j]: least objective of n bins over steps 0 … j.
    """
    size = len(cost)
    best = cost[0].copy()
    came_from = [np.zeros(size, np.int64)]
    partitions = [[0]]
    for _ in range(1, size):
        before = np.concatenate([[np.inf], best[:-1]])  # best of one bin fewer over steps 0 … i−1
        reach = before[:, None] + cost
        came_from.append(reach.argmin(axis=0))
        best = reach.min(axis=0)
        starts, end = [], size - 1
        for choice in reversed(came_from):
            starts.append(int(choice[end]))
            end = starts[-1] - 1
        partitions.append(starts[::-1])
    return partitions


def _value_cost(one: Watched, use: Array, step_of: Array, steps: int) -> Array:
    """[S, S] cost of one value; entries below the diagonal mean nothing."""
    lo, hi, _ = exact(one.value, use.tolist(), one.transform)
    low, high = np.zeros(steps), np.zeros(steps)  # of each step, zero included
    np.minimum.at(low, step_of, lo.min(axis=1))
    np.maximum.at(high, step_of, hi.max(axis=1))
    delta = (_running(low, np.minimum) * -1 + _running(high, np.maximum)) / one.grid.levels  # [S, S]
    upper = np.triu_indices(steps)
    widest = float(delta[upper].max())
    if widest < _LEAST:
        return np.zeros((steps, steps))
    least = delta[upper][delta[upper] > widest * 1e-4].min()  # narrower ones, silent steps: no error worth a number
    points = np.unique(np.geomspace(least, widest, CURVE_POINTS))
    curve = _error_curves(one, use, step_of, steps, points)
    log_delta = np.log(np.maximum(delta, points[0]))
    cost = np.zeros((steps, steps))
    for t in range(steps):  # runs that contain step t: first ≤ t ≤ last
        at = log_delta[: t + 1, t:]
        cost[: t + 1, t:] += np.exp(np.interp(at, np.log(points), np.log(np.maximum(curve[t], _LEAST))))
    return cost


def _running(ends: Array, fold: np.ufunc) -> Array:
    """[S, S]: fold of ends[i … j] at [i, j], j ≥ i."""
    table = np.zeros((len(ends), len(ends)))
    for i in range(len(ends)):
        table[i, i:] = fold.accumulate(ends[i:])
    return table


def _error_curves(one: Watched, use: Array, step_of: Array, steps: int, points: Array) -> Array:
    """Relative rounding error of each step at each Δ in `points`, summed over branches, [S, P]."""
    _, rows = one.value.linear()
    error, power = np.zeros((len(use), len(points))), np.zeros(len(use))
    for index, slot in enumerate(use):
        values = thin(rows[slot] if one.transform is None else one.transform(rows[slot]), CURVE_VALUES)
        power[index] = np.square(values, dtype=np.float64).mean()
        scaled = values[None, :] / points[:, None].astype(np.float32)
        scaled -= np.rint(scaled)
        error[index] = np.square(scaled, dtype=np.float64).mean(axis=1) * points**2
    floor = max(QUIET * float(power.mean()), _LEAST)
    curve = np.zeros((steps, len(points)))
    np.add.at(curve, step_of, error / np.maximum(power, floor)[:, None])
    return curve
