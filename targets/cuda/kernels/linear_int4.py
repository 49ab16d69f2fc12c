"""x[M, K] (int8 codes, of 8 bits or 4) times W[K, N] in 4 bits: W4A8 and W4A4.

Hopper has no instruction that multiplies 4-bit integers. Both are multiplied as int8 here, exactly: 4-bit weights save
memory (half of int8, a quarter of bfloat16), 4-bit activations run at the speed of 8 bits.

    per channel:  y[m, n] = (Σ_k c[m, k] · w[k, n] − z · Σ_k w[k, n]) · s_w[n] · s_x               int32, then float32
    groups:       y[m, n] = (Σ_g s_w[g, n] · Σ_{k in g} c[m, k] · w[k, n] − z · a[n]) · s_x        int32 within a group
                  a[n] = Σ_g s_w[g, n] · Σ_{k in g} w[k, n], once at load: a sum for each group would weigh as much as
                  the scales do

c codes of x, z their zero (None: 0), s_x their scale. What follows is _epilogue.py's.

Weights lie as _pack4.py says, and the product is computed transposed, Wᵀ · xᵀ: wgmma takes its first operand from
registers, so the weights go from shared memory through one or two instructions for four of them into the tensor
cores, and never back to memory. x as it lies is the second operand, K-major. The halves of a byte meet two tiles
of x that lie H inputs apart; both are multiplied as 16 · w, and the last factor takes 16 back.

Floor, H200 (1979 TOP/s, 4.8 TB/s): 2·M·N·K operations, M·K + N·K / 2 + 2·M·N bytes. M = 32760, K = N = 5120: 0.87 ms
against 0.11 ms of traffic, so 4 bits gain no time there; M = 16: 2.7 µs of weights, half of int8's. In groups every
sum of a group is also converted and added outside the tensor cores, 64 conversions a cycle against 4096 products:
1 / 64 to g / 4096, half the product's time at g = 128, twice it at g = 32 (a bfloat16 product's time).
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._across import low_rank_across
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue, finish
from vdq_export.targets.cuda.kernels._numbers import INTERPRETED
from vdq_export.targets.cuda.kernels._operand import block, grid, operand, whole
from vdq_export.targets.cuda.kernels._pack4 import ALIGNMENT
from vdq_export.targets.cuda.kernels._tile import place
from vdq_export.targets.cuda.kernels._weight import Weight

MOST_INPUTS = 65536  # 16 · 8 · 255 of each still add up to an int32
LEAST_DEPTH = 32  # of an int8 product on the tensor cores


@triton.jit
def halves(packed):
    """(16 · first half's weights, 16 · second half's), int8, of a tile of bytes."""
    second = packed & -16
    if INTERPRETED:
        first = packed << 4
    else:  # as a shift of bytes it would be taken apart into bytes
        first = tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return first, second


@triton.jit
def _sums(x, w, w_scale, row, col, m, n, k, half, x_stride,
          GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          TMA: tl.constexpr):  # fmt: skip
    """16 · Σ_k c·w of a tile, transposed, [N, M]: int32, or float32 with the scales of groups in it."""
    cols = (col + tl.arange(0, BLOCK_N)) % n  # beyond the edge: any that exist, nothing is stored of them
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else tl.int32)
    for at in range(0, half, BLOCK_K):
        packed = block(w, col, at, n, half, half, BLOCK_N, BLOCK_K, TMA)
        a = block(x, row, at, m, k, x_stride, BLOCK_M, BLOCK_K, TMA)
        b = block(x, row, half + at, m, k, x_stride, BLOCK_M, BLOCK_K, TMA)
        first, second = halves(packed)
        if GROUP:  # both scales before the products that they wait for
            a_scale = tl.load(w_scale + tl.minimum(at, k - 1) // GROUP * n + cols)
            b_scale = tl.load(w_scale + tl.minimum(half + at, k - 1) // GROUP * n + cols)
            acc += tl.dot(first, a.T, out_dtype=tl.int32).to(tl.float32) * a_scale[:, None]
            acc += tl.dot(second, b.T, out_dtype=tl.int32).to(tl.float32) * b_scale[:, None]
        else:
            acc = tl.dot(first, a.T, acc, out_dtype=tl.int32)
            acc = tl.dot(second, b.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _scaled(acc, cols, n, w_scale, colsum, x_scale, x_zero, GROUP: tl.constexpr):
    """The sums [N, M] of 16 · c · w, less the zero's part, in the units of x and w."""
    known = cols % n
    factor = tl.load(x_scale).to(tl.float32) * 0.0625
    if GROUP:
        if x_zero is not None:
            acc -= (16.0 * tl.load(x_zero).to(tl.float32)) * tl.load(colsum + known)[:, None]
        v = acc * factor
    else:
        if x_zero is not None:
            acc -= (16 * tl.load(x_zero).to(tl.int32)) * tl.load(colsum + known)[:, None]
        v = acc.to(tl.float32) * (factor * tl.load(w_scale + known))[:, None]
    return v


@triton.jit(do_not_specialize_on_alignment=["x_scale", "x_zero", "out_scale", "out_zero"])
def _kernel(
    x, w, w_scale, colsum, x_scale, x_zero, m, n, k, half, x_stride,
    bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """This program's tile, or every programs-th from it on. BLOCK_K: bytes of a row a step, each two inputs."""
    number = tl.program_id(0)
    beyond = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) if PERSISTENT else number + 1
    for each in tl.range(number, beyond, tl.num_programs(0), flatten=PERSISTENT):
        down, right = place(each, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = down * BLOCK_M, right * BLOCK_N
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        acc = _sums(x, w, w_scale, row, col, m, n, k, half, x_stride, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        v = _scaled(acc, cols, n, w_scale, colsum, x_scale, x_zero, GROUP)
        if low is not None:
            v = low_rank_across(v, low, low_stride, up, rows, cols, m, n, RANK, RANK_BLOCK)
        finish(
            tl.trans(v), rows, cols, m, n,
            bias, None, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
            RANK, RANK_BLOCK, ACT, ONE_SAMPLE, LOW, HIGH, FP8,
        )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: Weight,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    epilogue: Epilogue,
    config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) by the kernel."""
    (m, k), n, group = x.shape, weight.n, weight.group
    if config is None:
        config = _config.config(
            "linear_int4", lambda one: launch(x, weight, x_scale, x_zero, epilogue, one),
            m=m, n=n, k=k, group=group, **epilogue.kinds,
        )  # fmt: skip
    x = x.contiguous()
    depth = min(config["BLOCK_K"], gcd(ALIGNMENT, group))
    config = {**config, "BLOCK_K": depth, "TMA": int(config["TMA"] and whole(x))}
    if k > MOST_INPUTS or depth < LEAST_DEPTH:
        return reference(x, weight, x_scale, x_zero, epilogue)
    y, q = epilogue.outputs(m, n, x.device)
    if m and n:
        packed = weight.data.view(torch.int8)
        _kernel[grid(m, n, config, x.device)](
            operand(x, config["BLOCK_M"], depth, config), operand(packed, config["BLOCK_N"], depth, config),
            weight.scale, weight.colsum, x_scale, x_zero, m, n, k, packed.shape[1], x.stride(0),
            **epilogue.arguments(y, q, m), GROUP=group, **config, enable_fp_fusion=True,
        )  # fmt: skip
    return y, q


def reference(
    x: torch.Tensor, weight: Weight, x_scale: torch.Tensor, x_zero: torch.Tensor | None, epilogue: Epilogue
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) in plain torch. Float64 holds the sums of integers exactly, and multiplies on every device."""
    codes, levels = x.double(), weight.codes().double()
    if x_zero is not None:
        codes = codes - x_zero.double()
    if not weight.group:
        product = (codes @ levels).float() * (x_scale * weight.scale)
    else:
        scale = weight.scale.double().repeat_interleave(weight.group, 0)[: weight.k]
        product = (codes @ (levels * scale)).float() * x_scale
    return epilogue.reference(product)
