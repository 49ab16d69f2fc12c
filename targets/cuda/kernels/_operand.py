"""Row-major operands on their way in: tile by tile through the copy engine (TMA, Hopper and later), or by pointers.

The copy engine wants rows of whole 16 bytes and fills in zeros beyond the edges. Pointers take any shape.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vdq_export.targets.cuda.kernels._backend import blocks
from vdq_export.targets.cuda.kernels._config import Config

LINE = 16  # bytes


@triton.jit
def block(source, row, at, rows, stop, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr):
    """source[row …, at …], [ROWS, DEPTH]; zeros from row `rows` and from column `stop` on."""
    if TMA:
        found = source.load([row, at])
    else:
        down, right = row + tl.arange(0, ROWS), at + tl.arange(0, DEPTH)
        where = source + down[:, None].to(tl.int64) * stride + right[None, :]
        found = tl.load(where, mask=(down < rows)[:, None] & (right < stop)[None, :], other=0.0)
    return found


def operand(tensor: torch.Tensor, rows: int, depth: int, config: Config) -> torch.Tensor | TensorDescriptor:
    """tensor for `block` of [rows, depth]."""
    return TensorDescriptor.from_tensor(tensor, [rows, depth]) if config["TMA"] else tensor


def whole(tensor: torch.Tensor) -> bool:
    """Can the copy engine read it?"""
    return tensor.stride(0) * tensor.element_size() % LINE == 0 and tensor.data_ptr() % LINE == 0


def grid(m: int, n: int, config: Config, device: torch.device) -> tuple[int]:
    """Programs for an output of [m, n]: one a tile, or (PERSISTENT) one a multiprocessor, which takes several."""
    tiles = blocks(m, config["BLOCK_M"]) * blocks(n, config["BLOCK_N"])
    return (min(tiles, _multiprocessors(device)) if config["PERSISTENT"] else tiles,)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
