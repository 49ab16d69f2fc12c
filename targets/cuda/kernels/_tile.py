"""The order in which programs take the tiles of an output: those that run together share rows and columns in the L2."""

from __future__ import annotations

import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels._backend import blocks


@triton.jit
def tile(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of this program's tile."""
    return place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)


@triton.jit
def place(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile by its number: down GROUP_M tiles, then one to the right."""
    across = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = program // across * GROUP_M
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP_M)
    within = program % across
    return first + within % height, within // height


def grid(m: int, n: int, config: dict[str, int]) -> tuple[int]:
    """Programs for an output of [m, n]."""
    return (blocks(m, config["BLOCK_M"]) * blocks(n, config["BLOCK_N"]),)
