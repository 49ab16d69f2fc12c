"""GPTQ (Frantar et al. 2023): integers for a weight that make the layer's output right, not the weight.

Legend: W [K, N] the weight, Ŵ its rounding, E = W − Ŵ; X̂ [n, K] what the layer reads, quantized; H = X̂ᵀX̂ + λI.

    ‖X̂·W − X̂·Ŵ‖² + λ‖E‖² = tr(EᵀHE) = ‖L·E‖²          H = LᵀL, L lower triangular

GPTQ rounds one input channel after the other and moves the channels not yet rounded to where the output is least
wrong. Row i of L·E has only e_0 … e_i in it, so that least is 0 in every row to come, and channel i has moved to

    t_i = w_i + Σ_{j<i} (L_ij / L_ii) · e_j            ŵ_i = the level nearest to t_i

That is the paper's update, sum for sum, without its inverse of H: errors are gathered when a channel's turn comes
instead of being spread over all later channels each time. (Chen et al. 2025 show that this is Babai's nearest plane.)
Errors of earlier blocks come in by one matrix product a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.weight_ranges import code_type, round_rows
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array
from vdq_export.recipe import GptqRecipe
from vdq_export.weights.number_grid import numpy_type

STEP = 32  # channels rounded between two matrix products inside a block; a group, where scales are found on the way
MOST_DAMPING = 1e4  # shares of the mean diagonal beyond which H cannot be what stops Cholesky
_CORNER = 256  # rows of L found at a time

ScaleOf = Callable[[Array], Array]  # weights [R, N] -> scale [N]


class Factor(NamedTuple):
    """L / diag(L) [K, K] float32 (only below the diagonal it means anything), rows and columns in `order` of rounding.

    damping: the share of the mean diagonal of X̂ᵀX̂ that λ is, after `raised` failures.
    """

    unit: Array
    order: Array
    damping: float
    raised: int


class Rounded(NamedTuple):
    """codes [K, N] int8 (int16 beyond 8 bits, float8 on its own grid); scale float32 [N], or [K / group, N]."""

    codes: Array
    scale: Array


def factorise(hessian: Array, settings: GptqRecipe) -> Factor:
    """L of hessian [K, K] = X̂ᵀX̂ plus damping; one serves all layers that read the same input.

    Cholesky is tried in float32, then in float64, then with ten times the damping, and so on. Without any input λ is
    1, so that every channel is rounded to nearest; so is a channel that was always 0, whatever the others are.
    Raises CalibrationError where X̂ᵀX̂ is not finite.
    """
    mean = float(np.trace(hessian, dtype=np.float64)) / max(1, len(hessian))
    if not np.isfinite([mean, hessian.max(initial=0.0), hessian.min(initial=0.0)]).all():
        raise CalibrationError("the Hessian of its input holds NaN or Inf")
    diagonal = np.diagonal(hessian)
    order = np.argsort(-diagonal, kind="stable") if settings.act_order else np.arange(len(hessian))
    damping, raised, dtype = settings.damping, 0, "float32"
    while True:
        lower = (hessian[np.ix_(order, order)] if settings.act_order else hessian).astype(dtype)
        lower[np.diag_indices_from(lower)] += damping * mean if mean > 0 else 1.0
        try:
            _triangle(lower)
        except np.linalg.LinAlgError:
            if dtype == "float64":
                damping, raised = damping * 10, raised + 1
            if damping > MOST_DAMPING:
                raise
            dtype = "float64"
            continue
        lower /= np.diagonal(lower)[:, None].copy()
        return Factor(lower.astype(np.float32, copy=False), order, damping, raised)


def gptq(weight: Array, factor: Factor, fmt: WeightFormat, scale_of: ScaleOf, settings: GptqRecipe) -> Rounded:
    """Codes and scales of weight [K, N].

    A scale a channel is that of the weight as it stands. Group scales are those of the weights as the rounding of
    earlier groups has moved them; with act_order, where a group's channels are not rounded together, as they stand.
    """
    k, n = weight.shape
    group = fmt.group or max(1, k)
    moving = bool(fmt.group) and not settings.act_order
    scale = np.empty((k // group, n), np.float32) if moving else _scales(weight, group, scale_of)
    w = np.ascontiguousarray(weight[factor.order], np.float32)
    step = group if moving else min(STEP, settings.block)
    block = max(step, settings.block // step * step)
    codes, errors = np.empty((k, n), numpy_type(code_type(fmt))), np.empty_like(w)
    for first in range(0, k, block):
        gathered = factor.unit[first : first + block, :first] @ errors[:first]
        for start in range(first, min(first + block, k), step):
            rows = slice(start, min(start + step, k))
            shift = gathered[start - first : rows.stop - first]
            shift += factor.unit[rows, first:start] @ errors[first:start]
            if moving:
                own = np.tril(factor.unit[rows, rows])
                scale[start // group] = scale_of(w[rows] + np.linalg.solve(own, shift))
            for i in range(start, rows.stop):
                channel = factor.order[i]
                levels = scale[channel // group]
                target = w[i] + shift[i - start]
                target += factor.unit[i, start:i] @ errors[start:i]
                codes[channel] = round_rows(target[None], levels, fmt)[0]
                np.subtract(w[i], codes[channel].astype(np.float32) * levels, out=errors[i])
    return Rounded(codes, scale if fmt.group else scale[0])


def _scales(weight: Array, group: int, scale_of: ScaleOf) -> Array:
    """[K / group, N], of the weight as it stands."""
    return np.stack([scale_of(weight[start : start + group]) for start in range(0, max(1, len(weight)), group)])


def _triangle(h: Array) -> None:
    """Put L of h = LᵀL [K, K] into the lower triangle of h. Raises LinAlgError where h is not positive definite.

    Blocks of rows from the last one up, all of it matrix products but the corners: several times the speed of
    numpy's own Cholesky, which factorises from the other end and copies.
    """
    size = len(h)
    for stop in range(size, 0, -_CORNER):
        start = max(0, stop - _CORNER)
        rows = h[start:stop, :stop]
        rows -= h[stop:, start:stop].T @ h[stop:, :stop]
        own: Any = rows[:, start:]
        own[...] = np.linalg.cholesky(own[::-1, ::-1]).T[::-1, ::-1]
        if not np.isfinite(own).all():
            raise np.linalg.LinAlgError("overflow in Cholesky")
        rows[:, :start] = np.linalg.inv(own).T @ rows[:, :start]
