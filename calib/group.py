"""Everything about the layers that read one value, once it is known what the value is transformed to.

Legend: K input channels, N output channels, B bins, n sampled rows; X' [n, K] transformed rows, X̂ the same quantized,
W' [K, N] transformed weight, D·U its low-rank branch.

1. D·U is split off W'; what follows quantizes the residual R = W' − D·U.
2. R gets scales and is rounded to nearest.
3. Each bin's activation range is clipped where that makes X̂·R̂ + X'·D·U more like X'·W'.
4. GPTQ rounds R again for the X̂ of all bins together (they share the weights). One row in HELD_OUT is not shown to it:
   a layer for which it is no better on those rows keeps step 2.

A group depends on no other, so groups are solved in parallel processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from vdq_export.calib import clip, low_rank, weight_ranges
from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.gptq import Factor, factorise, gptq
from vdq_export.calib.low_rank import Split
from vdq_export.calib.ranges import Grid
from vdq_export.errors import CalibrationError, VdqError
from vdq_export.graph import Array
from vdq_export.plan import Dynamic, LowRank, Range, TensorKind, WeightPlan
from vdq_export.recipe import Recipe, WeightRecipe
from vdq_export.weights import number_grid
from vdq_export.work import units
from vdq_export.work.engine import Engine, Local
from vdq_export.work.store import WorkStore

HELD_OUT = 8
LIGHT = 1e9  # multiply-adds below which a group is not worth a process
_METHOD = {
    "minmax": "largest magnitude",
    "mse": "least squared error",
    "pbq": "progressive search of the bound",
}


@dataclass(frozen=True)
class GroupTask:
    """The linears `names`, all of which read one value.

    rows: X' [n, K] float32 of each bin. ranges, dynamic: of each bin, one of both or both empty; grid: of the
    activation.
    weights: W' [K, N], formats, ranks (0: no branch): of each linear.
    """

    names: tuple[str, ...]
    rows: tuple[Array, ...]
    ranges: tuple[Range, ...]
    dynamic: tuple[Dynamic, ...]
    grid: Grid
    weights: tuple[Array, ...]
    formats: tuple[WeightFormat, ...]
    ranks: tuple[int, ...]
    recipe: Recipe


@dataclass(frozen=True)
class LayerWeights:
    """One linear's part of the plan. tensors: "codes", "scale", "down", "up", as plan.tensor_name() describes them."""

    weight: WeightPlan
    low_rank: LowRank | None
    tensors: dict[TensorKind, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupResult:
    ranges: tuple[Range, ...]
    dynamic: tuple[Dynamic, ...]
    layers: tuple[LayerWeights, ...]


class _Rounding(NamedTuple):
    """Codes [K, N] and scale [N] or [K / group, N] of one residual; by_gptq: its codes are not the nearest."""

    codes: Array
    scale: Array
    why: str
    by_gptq: bool = False

    @property
    def weight(self) -> Array:
        return number_grid.dequantize(self.codes, self.scale)


class _Evidence(NamedTuple):
    """What GPTQ learns from, and held-out rows [n, K]: exact, quantized."""

    factor: Factor
    exact: Array
    quantized: Array


def solve_group(task: GroupTask) -> GroupResult:
    """Raises CalibrationError naming the layers."""
    try:
        return _solve(task)
    except VdqError as error:
        raise CalibrationError(f"{', '.join(task.names)}: {error.what}", hint=error.hint) from error
    except Exception as error:
        raise CalibrationError(f"{', '.join(task.names)}: {type(error).__name__}: {error}") from error


def solve_groups(
    tasks: Iterable[GroupTask], engine: Engine | None = None, store: WorkStore | None = None
) -> Iterator[GroupResult]:
    """solve_group() of every task, in order; the same numbers whatever runs them. store: keeps the costly ones.

    As many tasks are drawn ahead as the engine has room for. Raises CalibrationError naming the layers.
    """
    name: Callable[[GroupTask], str] = lambda task: ", ".join(task.names)  # noqa: E731
    return units.in_order(
        engine or Local(),
        store,
        solve_group,
        tasks,
        GroupResult,
        name=name,
        is_light=is_light,
        is_worth=lambda task: is_costly(task) and not is_light(task),
    )


def is_costly(task: GroupTask) -> bool:
    """Whether it does more with a weight than to read and round it, which takes as long as reading the result."""
    settings = task.recipe
    return (
        settings.weights.rounding != "nearest"
        or settings.weights.range != "minmax"
        or bool(settings.activations.clip and task.rows)
        or any(task.ranks)
    )


def is_light(task: GroupTask) -> bool:
    """Whether solving it costs less than a process, and sending it there; it depends on recipe and shapes alone."""
    if not is_costly(task):
        return True
    rows, k = sum(len(x) for x in task.rows), task.weights[0].shape[0]
    return bool((rows + k) * k * (k + sum(w.shape[1] for w in task.weights)) < LIGHT)


def _solve(task: GroupTask) -> GroupResult:
    branches = [low_rank.split(w, r) if r else None for w, r in zip(task.weights, task.ranks, strict=True)]
    residuals = [w if b is None else w - b.down @ b.up for w, b in zip(task.weights, branches, strict=True)]
    settings = task.recipe.weights
    formats = [weight_ranges.fitted(r, fmt) for r, fmt in zip(residuals, task.formats, strict=True)]
    # Nearest codes follow from the scale; they are made here only for those who compare them.
    compared = settings.rounding == "gptq" or bool(task.recipe.activations.clip)
    rounded = [_nearest(r, fmt, settings, compared) for r, fmt in zip(residuals, formats, strict=True)]
    ranges, dynamic = (
        (task.ranges, task.dynamic)
        if not compared
        else clip.search(
            task.rows,
            task.ranges,
            task.dynamic,
            task.grid,
            task.weights,
            [one.weight for one in rounded],
            [None if b is None else (b.down, b.up) for b in branches],
            task.recipe.activations.clip,
        )
    )
    if settings.rounding == "gptq":
        evidence = _evidence(task, ranges or dynamic)
        rounded = [
            _by_gptq(r, fmt, settings, plain, evidence, _power(evidence.exact @ w))
            for r, fmt, plain, w in zip(residuals, formats, rounded, task.weights, strict=True)
        ]
    layers = tuple(_layer(b, one, fmt) for b, one, fmt in zip(branches, rounded, formats, strict=True))
    return GroupResult(tuple(ranges), tuple(dynamic), layers)


def _nearest(residual: Array, fmt: WeightFormat, settings: WeightRecipe, compared: bool) -> _Rounding:
    scale = weight_ranges.scales(residual, fmt, settings.range)
    cell = f"a group of {fmt.group}" if fmt.group else "a channel"
    codes = weight_ranges.quantize(residual, scale, fmt) if compared else np.empty((0, 0), np.int8)
    return _Rounding(codes, scale, f"{_METHOD[settings.range]} {cell}")


def _evidence(task: GroupTask, how: Sequence[Range | Dynamic]) -> _Evidence:
    exact = np.concatenate(task.rows)
    quantized = exact  # of weights alone
    if how:
        quantized = np.concatenate([quantize_rows(x, one, task.grid) for x, one in zip(task.rows, how, strict=True)])
    out = _held_out(exact)
    learnt = quantized if out.all() else quantized[~out]
    return _Evidence(factorise(learnt.T @ learnt, task.recipe.weights.gptq), exact[out], quantized[out])


def _held_out(rows: Array) -> Array:
    """Mask of every eighth different row: equal ones stay on one side. All of them where there are fewer than two."""
    number: dict[bytes, int] = {}
    # A few channels tell rows apart; equal tokens are equal to the bit.
    place = np.array([number.setdefault(row.tobytes(), len(number)) for row in rows[:, :16]])
    return place % HELD_OUT == 1 if len(number) > 1 else np.ones(len(rows), bool)


def _by_gptq(
    residual: Array,
    fmt: WeightFormat,
    settings: WeightRecipe,
    plain: _Rounding,
    evidence: _Evidence,
    power: float,
) -> _Rounding:
    """GPTQ's rounding, or `plain` where that is no worse on held-out rows. power: ‖X'·W'‖² of these rows."""
    cell = fmt._replace(group=0)  # gptq() asks for one scale a channel of what it hands over
    scale_of: Callable[[Array], Array] = lambda w: weight_ranges.scales(w, cell, settings.range)  # noqa: E731
    found = gptq(residual, evidence.factor, fmt, scale_of, settings.gptq)
    ours = _Rounding(found.codes, found.scale, plain.why, by_gptq=True)
    wanted = evidence.exact @ residual
    error, nearest = (_power(wanted - evidence.quantized @ one.weight) / (power or 1.0) for one in (ours, plain))
    numbers = f"held-out output error {error:.2e} against {nearest:.2e} rounded to nearest"
    if not error < nearest:
        return plain._replace(why=f"{plain.why}; GPTQ gains nothing: {numbers}")
    factor = evidence.factor
    damping = f", damping {factor.damping:g} after {factor.raised} failures of Cholesky" if factor.raised else ""
    return ours._replace(why=f"{plain.why}; GPTQ: {numbers}{damping}")


def _power(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _layer(branch: Split | None, rounding: _Rounding, fmt: WeightFormat) -> LayerWeights:
    tensors: dict[TensorKind, Array] = {"codes": rounding.codes} if rounding.by_gptq else {}
    if fmt.group:
        tensors["scale"] = rounding.scale
    plan = WeightPlan(
        dtype=fmt.dtype,
        qmax=fmt.qmax,
        why=rounding.why,
        scale=() if fmt.group else tuple(rounding.scale.tolist()),
        bits=fmt.bits,
        group=fmt.group,
        grid=fmt.grid,
        scales=fmt.scales,
        unit=fmt.unit,
        codes=rounding.by_gptq,
    )
    if branch is None:
        return LayerWeights(plan, None, tensors)
    shape, rank = (len(branch.down), branch.up.shape[1]), branch.down.shape[1]
    how = "SVD" if low_rank.is_exact(shape, rank) else "randomised SVD"
    low = LowRank(rank=rank, error=branch.error, why=f"{how}: {branch.error:.3g} of the weight's norm is left to round")
    return LayerWeights(plan, low, {**tensors, "down": branch.down, "up": branch.up})
