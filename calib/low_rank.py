"""Low-rank branches (SVDQuant): the part of a weight that stays in float, and how much of it each layer gets.

Legend: W [K, N] a weight after smoothing and rotation, σ_1 ≥ σ_2 ≥ … its singular values, r the rank of its branch.

    W = down[K, r] · up[r, N] + residual       the truncated SVD: no other pair of that rank leaves less ‖residual‖

by Eckart and Young; down and up each take √σ, so that neither needs a wider range than the other.

Small weights get LAPACK's SVD. The larger ones get a randomised one (Halko, Martinsson, Tropp 2011: range finder with
OVERSAMPLING more columns than the rank and POWER_ITERATIONS), seeded by the shape: r of thousands of directions cost
a few products with W instead of minutes. What it misses are directions whose σ is next to σ_r, which matter as little
as any it could have taken instead; the error stated is that of the pair that is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from vdq_export.graph import Array, Linear
from vdq_export.recipe import LowRankRecipe

EXACT_SIDE = 256  # weights with a side up to this are decomposed whole
OVERSAMPLING, POWER_ITERATIONS = 16, 4
MOST = 128  # rank that a budget gives a layer at most


class Split(NamedTuple):
    """down [K, r], up [r, N] float32; error: ‖W − down·up‖ / ‖W‖ (Frobenius), 0 for W = 0."""

    down: Array
    up: Array
    error: float


class Spectrum(NamedTuple):
    """shape of W and its leading σ²/‖W‖², descending: what each further rank takes off the squared relative error."""

    shape: tuple[int, int]
    gains: Array

    @property
    def cost(self) -> int:
        """Numbers that one rank stores: a column of down, a row of up."""
        return sum(self.shape)


def split(weight: Array, rank: int) -> Split:
    """The best branch of `rank`, or of the full rank where that is less."""
    w = np.asarray(weight, np.float32)
    rank = min(rank, *w.shape)
    u, sigma, vt = _svd(w, rank)
    root = np.sqrt(sigma[:rank])
    down, up = np.ascontiguousarray(u[:, :rank] * root), np.ascontiguousarray(root[:, None] * vt[:rank])
    return Split(down, up, _relative(w - down @ up, w))


def is_exact(shape: tuple[int, int], rank: int) -> bool:
    """Whether split() decomposes a weight [K, N] whole."""
    return min(shape) <= max(EXACT_SIDE, 2 * (rank + OVERSAMPLING))


def choose_ranks(linears: Sequence[Linear], settings: LowRankRecipe) -> dict[str, int]:
    """{layer: rank} of the linears that get a branch; a budget counts against the size of all `linears`."""
    matching = [x for x in linears if any(fnmatchcase(x.name, pattern) for pattern in settings.match)]
    if settings.budget:
        allowed = settings.budget * sum(k * n for k, n in (x.shape for x in linears))
        found = ranks([spectrum(x.read_weight()) for x in matching], allowed)
    else:
        found = [min(settings.rank, *x.shape) for x in matching]
    return {x.name: rank for x, rank in zip(matching, found, strict=True) if rank}


def spectrum(weight: Array) -> Spectrum:
    """The leading σ² of a weight, as many as a branch can have before it is half as large as the weight."""
    w = np.asarray(weight, np.float32)
    k, n = w.shape
    most = max(1, min(MOST, k * n // (2 * (k + n))))
    sigma = _svd(w, most)[1][:most].astype(np.float64)
    return Spectrum((k, n), sigma**2 / max(_squares(w), np.finfo(np.float64).tiny))


def ranks(spectra: Sequence[Spectrum], allowed: float) -> list[int]:
    """Ranks with the least sum of squared relative errors that store at most `allowed` numbers.

    Greedy: always the rank with the largest gain per number stored. Within a layer gains never grow and all cost the
    same, so this order takes them one after the other; and every choice of ranks is a set of such steps. No set as
    cheap as the one taken gains more (an exchange argument: a step left out gains no more per number than any taken),
    hence what is lost to the true optimum is less than the gain of the first step that no longer fits.
    """
    steps = [(gain / one.cost, i) for i, one in enumerate(spectra) for gain in one.gains.tolist() if gain > 0]
    found, left = [0] * len(spectra), allowed
    for _, i in sorted(steps, key=lambda step: (-step[0], step[1])):
        if spectra[i].cost <= left:
            found[i] += 1
            left -= spectra[i].cost
    return found


def _svd(w: Array, rank: int) -> tuple[Array, Array, Array]:
    """(u, σ, vᵀ), `rank` triples or more."""
    if is_exact(w.shape, rank):
        u, sigma, vt = np.linalg.svd(w, full_matrices=False)
        return u, sigma, vt
    random = np.random.default_rng([*w.shape, rank])
    q = np.linalg.qr(w @ random.standard_normal((w.shape[1], rank + OVERSAMPLING), np.float32))[0]
    for _ in range(POWER_ITERATIONS):
        q = np.linalg.qr(w @ np.linalg.qr(w.T @ q)[0])[0]
    u, sigma, vt = np.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, sigma, vt


def _relative(residual: Array, w: Array) -> float:
    size = _squares(w)
    return float(np.sqrt(_squares(residual) / size)) if size > 0 else 0.0


def _squares(x: Array) -> float:
    return float(np.square(x, dtype=np.float64).sum())
