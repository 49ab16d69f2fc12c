"""x[M, K] in floating point times W[K, N] in 8 or 4 bits: only the weights are quantized, to save memory.

    y[m, n] = Σ_k x[m, k] · w[k, n] · s_w[n]                   one scale a channel
    y[m, n] = Σ_g s_w[g, n] · Σ_{k in g} x[m, k] · w[k, n]     groups

The levels become x's own type in registers, exactly (integers up to 256 are bfloat16 numbers), and meet their scale
after the product, in float32: nothing is rounded that the float model would not round. What follows is
_epilogue.py's. As in linear_int4.py the product is computed transposed, so that the weights never go back to
memory, and a byte of two levels meets two tiles of x, each level as 16 · w.

float32 x is multiplied in three products of tf32, for programs that are to be exact rather than fast.

Floor, H200 (990 TFLOP/s of bfloat16, 4.8 TB/s): 2·M·N·K operations, 2·M·K + (1 or 1/2)·N·K + 2·M·N bytes. M = 32760,
K = N = 5120: 1.7 ms, a bfloat16 linear's time; M = 16: 5.5 µs of 8-bit weights, 2.7 µs of 4-bit ones, against 11 µs.
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
from vdq_export.targets.cuda.kernels._numbers import INTERPRETED, float_dot
from vdq_export.targets.cuda.kernels._operand import block, grid, operand, whole
from vdq_export.targets.cuda.kernels._pack4 import ALIGNMENT
from vdq_export.targets.cuda.kernels._tile import place
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.linear_int4 import halves

LEAST_DEPTH = 16  # of a 16-bit product on the tensor cores


@triton.jit
def _added(acc, levels, x, w_scale, at, n, k, cols, GROUP: tl.constexpr):
    """acc[N, M] + levels[N, D] @ x[M, D]ᵀ, times the group's scales where inputs `at` … are in one."""
    levels = levels.to(tl.float32 if INTERPRETED else x.dtype)  # the interpreter knows no bfloat16 (_numbers.py)
    if GROUP:
        scale = tl.load(w_scale + tl.minimum(at, k - 1) // GROUP * n + cols)
        acc += float_dot(levels, x.T, None) * scale[:, None]
    else:
        acc = float_dot(levels, x.T, acc)
    return acc


@triton.jit
def _sums(x, w, w_scale, row, col, m, n, k, width, x_stride, PACKED: tl.constexpr, GROUP: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Σ_k x·w of a tile, transposed, [N, M], float32, with the scales of groups in it; 16 times that if PACKED."""
    cols = (col + tl.arange(0, BLOCK_N)) % n  # beyond the edge: any that exist, nothing is stored of them
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for at in range(0, width, BLOCK_K):
        levels = block(w, col, at, n, width, width, BLOCK_N, BLOCK_K, TMA)
        a = block(x, row, at, m, k, x_stride, BLOCK_M, BLOCK_K, TMA)
        if PACKED:
            b = block(x, row, width + at, m, k, x_stride, BLOCK_M, BLOCK_K, TMA)
            levels, second = halves(levels)
            acc = _added(acc, second, b, w_scale, width + at, n, k, cols, GROUP)
        acc = _added(acc, levels, a, w_scale, at, n, k, cols, GROUP)
    return acc


@triton.jit(do_not_specialize_on_alignment=["out_scale", "out_zero"])
def _kernel(
    x, w, w_scale, m, n, k, width, x_stride,
    bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """This program's tile, or every programs-th from it on. width: bytes of a row of w. PACKED: two levels a byte."""
    number = tl.program_id(0)
    beyond = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) if PERSISTENT else number + 1
    for each in tl.range(number, beyond, tl.num_programs(0), flatten=PERSISTENT):
        down, right = place(each, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = down * BLOCK_M, right * BLOCK_N
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        v = _sums(x, w, w_scale, row, col, m, n, k, width, x_stride, PACKED, GROUP, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        if PACKED:
            v *= 0.0625
        if GROUP == 0:
            v *= tl.load(w_scale + cols, mask=cols < n, other=0.0)[:, None]
        if low is not None:
            v = low_rank_across(v, low, low_stride, up, rows, cols, m, n, RANK, RANK_BLOCK)
        finish(
            tl.trans(v), rows, cols, m, n,
            bias, None, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
            RANK, RANK_BLOCK, ACT, ONE_SAMPLE, LOW, HIGH, FP8,
        )  # fmt: skip


def launch(
    x: torch.Tensor, weight: Weight, epilogue: Epilogue, config: Config | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) by the kernel."""
    (m, k), n, group = x.shape, weight.n, weight.group
    if config is None:
        config = _config.config(
            "linear_weight_only", lambda one: launch(x, weight, epilogue, one),
            m=m, n=n, k=k, x=str(x.dtype).removeprefix("torch."), group=group, **epilogue.kinds,
        )  # fmt: skip
    x = x.contiguous()
    depth = gcd(config["BLOCK_K"], ALIGNMENT, group)
    config = {**config, "BLOCK_K": depth, "TMA": int(config["TMA"] and whole(x))}
    if depth < LEAST_DEPTH or weight.kind == "fp8":
        return reference(x, weight, epilogue)
    y, q = epilogue.outputs(m, n, x.device)
    if m and n:
        levels = weight.data.view(torch.int8)
        _kernel[grid(m, n, config, x.device)](
            operand(x, config["BLOCK_M"], depth, config), operand(levels, config["BLOCK_N"], depth, config),
            weight.scale, m, n, k, levels.shape[1], x.stride(0), **epilogue.arguments(y, q, m),
            PACKED=weight.kind == "int4", GROUP=group, **config, enable_fp_fusion=True,
        )  # fmt: skip
    return y, q


def reference(x: torch.Tensor, weight: Weight, epilogue: Epilogue) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) in plain torch, float32."""
    return epilogue.reference(x.float() @ weight.values())
