"""The kernel of normalize.py: what a program does with its rows, in the order of that file's docstring.

A tile is [BLOCK_M rows, COUNT blocks of columns]; without a rotation a block is just COUNT · C channels (A = B = 1). A
program takes one tile (RESIDENT: of whole rows, read once; or of rows that need no statistics), or LOOPS over the tiles
of its rows: with a norm twice, the second time from the cache. Loops fetch STAGES − 1 tiles ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels._epilogue import activation, quantize
from vdq_export.targets.cuda.kernels._hadamard import columns, rotate, split_dot
from vdq_export.targets.cuda.kernels._numbers import float_dot, narrow


@triton.jit
def _channel(vector, cols, known):
    """[1, columns] of a vector [K]."""
    return tl.load(vector + cols, mask=known, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load(x, rows, cols, inside, stride):
    at = rows[:, None].to(tl.int64) * stride + cols[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _statistics(v, inside, k, NORM: tl.constexpr):
    """(mean, sum of squared differences from it) of whole rows [1 a row]; root mean square: mean 0."""
    if NORM == "layer":
        mean = tl.sum(v, 1)[:, None] / k
        v = tl.where(inside, v - mean, 0.0)
        squares = tl.sum(v * v, 1)[:, None]
    else:
        squares = tl.sum(v * v, 1)[:, None]
        mean = tl.zeros_like(squares)
    return mean, squares


@triton.jit
def _statistics_of_row(
    x, rows, m, k, stride, chunks,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr,
    A: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of rows read tile by tile: Welford's recurrence in each place of a tile, then Chan's sum of the places.

    Nothing cancels, and only two reductions are needed. Places are filled from the left: what holds a number in one
    tile held one in all before.
    """
    mean = tl.zeros((BLOCK_M, COUNT * A * REST), tl.float32)
    squares = mean
    held = tl.zeros((COUNT * A * REST,), tl.float32)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        cols, filled = columns(chunk, COUNT, WIDTH, LEFT, A, REST)
        known = filled & (cols < k)
        inside = (rows < m)[:, None] & known[None, :]
        v = _load(x, rows, cols, inside, stride)
        if NORM == "layer":
            off = tl.where(inside, v - mean, 0.0)
            mean += off * (1.0 / (chunk + 1.0))
            squares += off * (v - mean)
            held += known.to(tl.float32)
        else:
            squares += v * v
    squares = tl.sum(squares, 1)[:, None]
    if NORM == "layer":
        of_row = tl.sum(mean * held[None, :], 1)[:, None] / k
        off = mean - of_row
        squares += tl.sum(off * off * held[None, :], 1)[:, None]
    else:
        of_row = tl.zeros_like(squares)
    return of_row, squares


@triton.jit
def _value(
    v, mean, inverse, cols, known, sample, k, weight, bias, scale, shift, smooth, NORM: tl.constexpr, ACT: tl.constexpr
):  # fmt: skip
    """act(norm(v) · weight + bias) · scale + shift, · smooth."""
    if NORM != "none":
        v = (v - mean) * inverse
    if weight is not None:
        v *= _channel(weight, cols, known)
    if bias is not None:
        v += _channel(bias, cols, known)
    v = activation(v, ACT)
    at = sample[:, None] * k + cols[None, :]
    if scale is not None:
        v *= tl.load(scale + at, mask=known[None, :], other=0.0).to(tl.float32)
    if shift is not None:
        v += tl.load(shift + at, mask=known[None, :], other=0.0).to(tl.float32)
    if smooth is not None:
        v *= _channel(smooth, cols, known)
    return v


@triton.jit
def _low(v, inside, down, cols, known, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, TERMS: tl.constexpr):
    """v @ down[columns], v as TERMS bfloat16 numbers, down exactly as one or (float16) two; float32 by tf32x3."""
    ranks = tl.arange(0, RANK_BLOCK)
    mask = known[:, None] & (ranks[None, :] < RANK)
    right = tl.load(down + cols[:, None].to(tl.int64) * RANK + ranks[None, :], mask=mask, other=0.0)
    v = tl.where(inside, v, 0.0)
    if right.dtype == tl.bfloat16:
        product = split_dot(v, right, TERMS)
    elif right.dtype == tl.float16:  # 11 bits: 8 and the other three
        wide = right.to(tl.float32)
        upper = narrow(wide, tl.bfloat16)
        lower = narrow(wide - upper.to(tl.float32), tl.bfloat16)
        product = float_dot(narrow(v, tl.bfloat16), lower, split_dot(v, upper, TERMS))
    else:
        product = float_dot(v, right.to(tl.float32), None)
    return product


@triton.jit
def row_kernel(
    x, m, k, stride, chunks, per_sample, epsilon, turn_scale,
    weight, bias, scale, shift, smooth, post, out_scale, out_zero, down, a, b, c, y, q, low,
    NORM: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr,
    RESIDENT: tl.constexpr, LOOPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    sample = tl.minimum(rows if not ONE_SAMPLE else first + tl.arange(0, 1), m - 1) // per_sample
    start, stop = tl.program_id(1), tl.program_id(1) + 1
    if LOOPS:
        start, stop = 0, chunks
    mean = tl.zeros((BLOCK_M, 1), tl.float32)
    inverse = mean
    if NORM != "none" and not RESIDENT:
        mean, squares = _statistics_of_row(
            x, rows, m, k, stride, chunks, NORM, BLOCK_M, COUNT, WIDTH, LEFT, A, B * C, STAGES
        )  # fmt: skip
        inverse = tl.rsqrt(squares / k + epsilon)
    total = tl.zeros((BLOCK_M, RANK_BLOCK), tl.float32)
    for chunk in tl.range(start, stop, num_stages=STAGES):
        cols, held = columns(chunk, COUNT, WIDTH, LEFT, A, B * C)
        known = held & (cols < k)
        inside = (rows < m)[:, None] & known[None, :]
        v = _load(x, rows, cols, inside, stride)
        if NORM != "none" and RESIDENT:
            mean, squares = _statistics(v, inside, k, NORM)
            inverse = tl.rsqrt(squares / k + epsilon)
        v = _value(v, mean, inverse, cols, known, sample, k, weight, bias, scale, shift, smooth, NORM, ACT)
        if TURNED:
            v = tl.where(inside, v, 0.0)
            v = rotate(v, a, b, c, turn_scale, BLOCK_M, COUNT, A, B, C, TERMS, FIRST)
        if post is not None:
            v *= _channel(post, cols, known)
        at = rows[:, None].to(tl.int64) * k + cols[None, :]
        if y is not None:
            tl.store(y + at, narrow(v, y.dtype.element_ty), mask=inside)
        if q is not None:
            tl.store(q + at, quantize(v, out_scale, out_zero, LOW, HIGH, FP8), mask=inside)
        if down is not None:
            total += _low(v, inside, down, cols, known, RANK, RANK_BLOCK, TERMS)
    if down is not None:
        ranks = tl.arange(0, RANK_BLOCK)
        at = rows[:, None].to(tl.int64) * RANK + ranks[None, :]
        tl.store(low + at, narrow(total, low.dtype.element_ty), mask=(rows < m)[:, None] & (ranks < RANK)[None, :])
