"""The order in which programs take the tiles of an output: those that run together share rows and columns in the L2."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile by its number: down GROUP_M tiles, then one to the right."""
    across = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = program // across * GROUP_M
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP_M)
    within = program % across
    return first + within % height, within // height
