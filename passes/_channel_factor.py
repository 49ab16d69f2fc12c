"""Shapes of a channel factor on its way from a node's output to its operand; plain numpy.

A factor has one dimension for each of its value's, of size 1 (constant along it) or the value's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from vdq_export.graph import Array


def aligned(factor: Array, rank: int) -> Array:
    """`factor` with `rank` dimensions: ones put in front, or taken away there (where they are ones)."""
    while factor.ndim > rank and factor.shape[0] == 1:
        factor = factor[0]
    return factor.reshape((1,) * (rank - factor.ndim) + factor.shape)


def collapsed(factor: Array) -> Array:
    """`factor` with size 1 along every dimension in which it is constant."""
    for axis in range(factor.ndim):
        first = factor.take([0], axis)
        if bool((factor == first).all()):
            factor = first
    return factor


def before_reshape(factor: Array, after: Sequence[int], before: Sequence[int]) -> Array:
    """The factor on a value of shape `before` that Reshape turned into `after`.

    Dimensions fall into groups of equal products; only groups along which the factor varies are written out.
    """
    wide, narrow = list(factor.shape), [1] * len(before)
    for ours, theirs in _groups(after, before):
        if any(factor.shape[i] > 1 for i in ours):
            for i in ours:
                wide[i] = after[i]
            for j in theirs:
                narrow[j] = before[j]
    return collapsed(np.broadcast_to(factor, wide).reshape(narrow))


def _groups(after: Sequence[int], before: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of index lists, shortest first, whose dimensions have equal products; size 1 belongs nowhere."""
    ours, theirs = [i for i, n in enumerate(after) if n != 1], [j for j, n in enumerate(before) if n != 1]
    ends_a = dict(zip(accumulate((after[i] for i in ours), int.__mul__), range(1, len(ours) + 1), strict=True))
    ends_b = dict(zip(accumulate((before[j] for j in theirs), int.__mul__), range(1, len(theirs) + 1), strict=True))
    groups, a, b = [], 0, 0
    for size in ends_a:
        if size in ends_b:
            groups.append((ours[a : ends_a[size]], theirs[b : ends_b[size]]))
            a, b = ends_a[size], ends_b[size]
    return groups


def before_split(factor: Array, axis: int, sizes: Sequence[int], at: int) -> Array:
    """The factor on Split's operand that changes part `at` alone."""
    shape = list(factor.shape)
    shape[axis] = sum(sizes)
    whole = np.ones(shape, factor.dtype)
    part = [slice(None)] * factor.ndim
    part[axis] = slice(sum(sizes[:at]), sum(sizes[: at + 1]))
    whole[tuple(part)] = factor
    return whole


def before_concat(factor: Array, axis: int, sizes: Sequence[int]) -> list[Array]:
    """One factor for each operand of a Concat."""
    if factor.shape[axis] == 1:
        return [factor] * len(sizes)
    return list(np.split(factor, np.cumsum(sizes)[:-1], axis))


def before_matmul(factor: Array, right: Sequence[int]) -> Array | None:
    """The factor on the right operand (shape `right`, rank >= 2) of a MatMul, None when its columns cannot carry it."""
    ours = aligned(factor, len(right))
    if ours.ndim != len(right) or len(right) < 2 or ours.shape[-2] != 1:
        return None
    return ours if all(n in (1, m) for n, m in zip(ours.shape, right, strict=True)) else None
