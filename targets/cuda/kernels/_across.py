"""For kernels that hold their tile transposed, [N, M]: the low-rank branch as it lies there.

Added in this layout, its product goes into the same registers; after a transposition it would need as many again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels._epilogue import RANKS
from vdq_export.targets.cuda.kernels._numbers import float_dot


@triton.jit
def low_rank_across(v, low, low_stride, up, rows, cols, m, n, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """v[N, M] + up[:, cols]ᵀ @ low[rows]ᵀ, float32."""
    WIDTH: tl.constexpr = min(RANK_BLOCK, RANKS)
    for first in tl.static_range(0, RANK_BLOCK, WIDTH):
        ranks = first + tl.arange(0, WIDTH)
        right_mask = (cols < n)[:, None] & (ranks < RANK)[None, :]
        left_mask = (ranks < RANK)[:, None] & (rows < m)[None, :]
        right = tl.load(up + ranks[None, :] * n + cols[:, None], mask=right_mask, other=0.0)
        left = tl.load(low + rows[None, :].to(tl.int64) * low_stride + ranks[:, None], mask=left_mask, other=0.0)
        if left.dtype != right.dtype:
            left, right = left.to(tl.float32), right.to(tl.float32)
        v = float_dot(right, left, v)
    return v
