"""W8A8: int8 codes of activations times int8 codes of weights on the tensor cores, and all that follows in registers.

    y[m, n] = (Σ_k c[m, k]·w[n, k] − zero·colsum[n]) · x_scale · w_scale[n]               one scale a channel
    y[m, n] = (Σ_g w_scale[g, n]·Σ_k∈g c[m, k]·w[n, k] − zero·colsum[n]) · x_scale        groups
    then the epilogue (_epilogue.py)

Sums of products are int32 and exact, the zero point's part of them too: 255·128·K < 2^31 up to K = 65,536. Sums
of groups become float32 one by one; those of up to 256 inputs are at most 2^22, where adding them to the bits of
1.5·2^23 is the conversion, so the product starts at these bits and the conversion costs one subtraction.

Layouts: x[M, K] and w[N, K'] row-major (K-major operands: the one form of wgmma.s32.s8.s8), y, q, residual [M, N].
Tiles come through the copy engine where x has whole rows of 16 bytes, which also fills up what lies outside, or by
pointers and masks (any K; groups that are no multiple of BLOCK_K; devices before Hopper).

PERSISTENT: as many programs as multiprocessors, each taking tile after tile in one loop, so that the first blocks of
the next tile are on their way while the last one's epilogue computes. Without it, a second program on the
multiprocessor hides the epilogue, when both fit (128 x 128 tiles of 4 warps).

Floor on an H100 SXM (1,979 int8 TOP/s, 3.35 TB/s) for M = 32,760: 2·M·N·K / peak, in brackets the bytes of x, w and a
bfloat16 y / bandwidth; and, not yet measured, what is expected: the bytes that tiles read of the L2 at 6.5 TB/s (48 a
clock and multiprocessor would be needed at the peak by 128 x 256 tiles, 64 by 128 x 128 ones; about 29 come).

    K x N          1536x1536     1536x8960     8960x1536     5120x5120     5120x13824    13824x5120
    floor, ms      0.078 (0.05)  0.456 (0.19)  0.456 (0.12)  0.868 (0.16)  2.343 (0.34)  2.343 (0.26)
    expected, ms   0.2           1.1           0.9           1.7           4.5           4.5

Triton (to 3.9 at least) leaves only products with float32 sums in flight from step to step and waits for integer ones
at the end of each: so steps are long, or two programs share a multiprocessor (tuned/).
"""

from __future__ import annotations

from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._backend import blocks
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue, finish, parts
from vdq_export.targets.cuda.kernels._tile import place
from vdq_export.targets.cuda.kernels._weight import ALIGNMENT, Weight

_MAGIC_BITS = tl.constexpr(0x4B400000)  # 1.5 · 2^23 as float32
_MAGIC = tl.constexpr(12582912.0)
MOST_INPUTS = 65536  # 255 · 128 of each still add up to an int32
_LEAST_K = 32  # inputs of one wgmma of 8-bit integers
_EXACT_GROUP = tl.constexpr(256)  # 256 · 128 · 128 = 2^22


def reference(
    x: torch.Tensor, weight: Weight, x_scale: torch.Tensor, x_zero: torch.Tensor | None, epilogue: Epilogue
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) in plain torch; sums are float64, exact far beyond int32."""
    codes = x.double()
    if not weight.group:
        sums = codes @ weight.codes().double()
        if x_zero is not None and weight.colsum is not None:
            sums = sums - x_zero.double() * weight.colsum
        return epilogue.reference(sums.float() * (x_scale * weight.scale))
    return epilogue.reference(_grouped_reference(codes, weight, x_zero) * x_scale)


def _grouped_reference(codes: torch.Tensor, weight: Weight, x_zero: torch.Tensor | None) -> torch.Tensor:
    """Σ_g w_scale[g]·(sums of group g) − zero·colsum, [M, N] float32."""
    total = torch.zeros(codes.shape[0], weight.n, device=codes.device)
    parts = zip(codes.split(weight.group, 1), weight.codes().split(weight.group, 0), weight.scale, strict=True)
    for part, w, scale in parts:
        total += (part @ w.double()).float() * scale
    if x_zero is not None and weight.colsum is not None:
        total -= x_zero * weight.colsum
    return total


@triton.jit
def _block(x, w, row, col, at, stop, m, n, x_stride, w_stride,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Inputs at … at + BLOCK_K of this tile's rows of x and w; zero from `stop` on in x."""
    if TMA:
        a = x.load([row, at])
        b = w.load([col, at])
    else:
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        cols = (col + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        ks = at + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x + rows * x_stride + ks, mask=(rows < m) & (ks < stop), other=0)
        b = tl.load(w + cols * w_stride + ks, mask=(cols < n) & (ks < stop), other=0)
    return a, b


@triton.jit
def _product(x, w, row, col, m, n, k, x_stride, w_stride,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Σ_k c·w of a tile, int32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for at in range(0, k, BLOCK_K):
        a, b = _block(x, w, row, col, at, k, m, n, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        total = tl.dot(a, b.T, total, out_dtype=tl.int32)
    return total


@triton.jit
def _grouped_product(x, w, w_scale, row, col, m, n, k, x_stride, w_stride, GROUP: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     TMA: tl.constexpr):  # fmt: skip
    """Σ_g w_scale[g]·Σ_k∈g c·w of a tile, float32."""
    cols = col + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, GROUP):
        scale = tl.load(w_scale + (start // GROUP) * n + cols, mask=cols < n, other=0.0)
        stop = tl.minimum(start + GROUP, k)
        part = tl.full((BLOCK_M, BLOCK_N), _MAGIC_BITS if GROUP <= _EXACT_GROUP else 0, tl.int32)
        for step in tl.static_range(0, GROUP, BLOCK_K):
            a, b = _block(x, w, row, col, start + step, stop, m, n, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
            part = tl.dot(a, b.T, part, out_dtype=tl.int32)
        if GROUP <= _EXACT_GROUP:
            total += (part.to(tl.float32, bitcast=True) - _MAGIC) * scale[None, :]
        else:
            total += part.to(tl.float32) * scale[None, :]
    return total


@triton.jit
def _scaled(sums, cols, n, w_scale, colsum, x_scale, x_zero, GROUP: tl.constexpr):
    """y of sums of these columns before the epilogue; grouped sums have the weights' scales already."""
    known = cols < n
    if GROUP == 0:
        if x_zero is not None:
            shift = tl.load(x_zero).to(tl.int32) * tl.load(colsum + cols, mask=known, other=0)
            sums -= shift[None, :]
        scale = tl.load(x_scale) * tl.load(w_scale + cols, mask=known, other=0.0)
        v = sums.to(tl.float32) * scale[None, :]
    else:
        if x_zero is not None:
            sums -= (tl.load(x_zero) * tl.load(colsum + cols, mask=known, other=0.0))[None, :]
        v = sums * tl.load(x_scale)
    return v


@triton.jit(do_not_specialize_on_alignment=["x_scale", "x_zero", "out_scale", "out_zero"])
def _kernel(
    x, w, w_scale, colsum, x_scale, x_zero, m, n, k, x_stride, w_stride,
    bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PART_N: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """This program's tile, or every programs-th from it on. x, w: descriptors (TMA) or pointers."""
    first = tl.program_id(0)
    beyond = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) if PERSISTENT else first + 1
    for number in tl.range(first, beyond, tl.num_programs(0), flatten=PERSISTENT):
        tile_row, tile_col = place(number, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_row * BLOCK_M, tile_col * BLOCK_N
        if GROUP == 0:
            sums = _product(x, w, row, col, m, n, k, x_stride, w_stride, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        else:
            sums = _grouped_product(x, w, w_scale, row, col, m, n, k, x_stride, w_stride, GROUP,
                                    BLOCK_M, BLOCK_N, BLOCK_K, TMA)  # fmt: skip
        pieces = parts(sums, PART_N)
        for i in tl.static_range(len(pieces)):
            rows = row + tl.arange(0, BLOCK_M)
            cols = col + i * pieces[i].shape[1] + tl.arange(0, pieces[i].shape[1])
            v = _scaled(pieces[i], cols, n, w_scale, colsum, x_scale, x_zero, GROUP)
            finish(v, rows, cols, m, n, bias, low, low_stride, up, gate, per_sample, residual, post, out_scale,
                   out_zero, y, q, RANK, RANK_BLOCK, ACT, ONE_SAMPLE, LOW, HIGH, FP8)  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: Weight,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    epilogue: Epilogue,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) by the kernel, in the given or the device's configuration."""
    m, k = x.shape
    if k > MOST_INPUTS:
        return reference(x, weight, x_scale, x_zero, epilogue)
    if config is None:
        config = _config.config(
            "linear_int8",
            lambda one: launch(x, weight, x_scale, x_zero, epilogue, one),
            m=m, n=weight.n, k=k, group=weight.group, **epilogue.kinds,
        )  # fmt: skip
    config = _fitting(config, x, weight)
    left, right = _operands(x, weight, config)
    y, q = epilogue.outputs(m, weight.n, x.device)
    _kernel[_grid(m, weight.n, config, x.device)](
        left, right, weight.scale, weight.colsum, x_scale, x_zero, m, weight.n, k, x.stride(0), weight.data.shape[1],
        **epilogue.arguments(y, q, m), GROUP=weight.group, **config, enable_fp_fusion=True,
    )  # fmt: skip
    return y, q


def _fitting(config: Config, x: torch.Tensor, weight: Weight) -> Config:
    """The configuration this input and weight allow: blocks divide groups, the copy engine reads rows of 16 bytes."""
    whole = x.stride(0) % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0
    group = weight.group
    block = config["BLOCK_K"]
    if group and group % block:
        divisor = gcd(group, block)
        block, whole = (divisor, whole) if divisor >= _LEAST_K else (max(_LEAST_K, block), False)
    return {**config, "BLOCK_K": block, "TMA": int(whole and config["TMA"] != 0)}


def _operands(
    x: torch.Tensor, weight: Weight, config: Config
) -> tuple[torch.Tensor | TensorDescriptor, torch.Tensor | TensorDescriptor]:
    if not config["TMA"]:
        return x, weight.data
    left, right = [config["BLOCK_M"], config["BLOCK_K"]], [config["BLOCK_N"], config["BLOCK_K"]]
    return TensorDescriptor.from_tensor(x, left), TensorDescriptor.from_tensor(weight.data, right)


def _grid(m: int, n: int, config: Config, device: torch.device) -> tuple[int]:
    tiles = blocks(m, config["BLOCK_M"]) * blocks(n, config["BLOCK_N"])
    return (min(tiles, _multiprocessors(device)) if config["PERSISTENT"] else tiles,)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
