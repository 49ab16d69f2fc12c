"""x[M, K] times W[K, N], both float8 (E4M3): scales known beforehand, one for x and one an output channel of W.

    y[m, n] = (Σ_k x[m, k] · w[k, n]) · s_x · s_w[n]            float32; what follows is _epilogue.py's

Hopper's tensor cores keep about 14 bits of an FP8 sum (DeepSeek-V3, arXiv 2412.19437, 3.3.2), which over thousands of
inputs costs more than float32 would. So they add up BLOCK_K inputs at a time, and those sums are added in float32
registers: one addition for BLOCK_K = 128 products, 1 / 128 of a cycle against 128 / 4096. (On other architectures
Triton makes the addition part of the instruction, which then adds up all inputs.)

Ampere has no FP8, not even as a type. There the bytes are read as such and turned into float16 by two shifts, exactly:

    s eeee mmm  ->  s 0eeee mmm0000000        the same number times 2^-8, subnormal ones too (2^-9 becomes 2^-17)

The tensor cores multiply these, and the last factor takes 2^16 back. E4M3's two NaN become ±480: no quantizer here
makes one of a number.

Floor, H200 (1979 TFLOP/s, 4.8 TB/s): as int8, 2·M·N·K operations and M·K + N·K + 2·M·N bytes. M = 32760, K = N = 5120:
0.87 ms against 0.11 ms of traffic; Ampere: a float16 product's time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue, finish
from vdq_export.targets.cuda.kernels._operand import block, grid, operand, whole
from vdq_export.targets.cuda.kernels._tile import place
from vdq_export.targets.cuda.kernels._weight import Weight

_SHIFT = tl.constexpr(256.0)  # float16 of the bits is this much smaller


@triton.jit
def float16_of_bits(bits):
    """2^-8 · the E4M3 number whose bits these bytes are, float16."""
    wide = bits.to(tl.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def _sums(x, w, row, col, m, n, k, x_stride, w_stride, BITS: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Σ_k x·w of a tile, float32; 2^-16 of it from bytes."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(0, k, BLOCK_K):
        a = block(x, row, at, m, k, x_stride, BLOCK_M, BLOCK_K, TMA)
        b = block(w, col, at, n, k, w_stride, BLOCK_N, BLOCK_K, TMA)
        if BITS:
            acc = tl.dot(float16_of_bits(a), float16_of_bits(b).T, acc)
        else:
            acc += tl.dot(a, b.T)
    return acc


@triton.jit(do_not_specialize_on_alignment=["x_scale", "out_scale", "out_zero"])
def _kernel(
    x, w, w_scale, x_scale, m, n, k, x_stride, w_stride,
    bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr, BITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """This program's tile, or every programs-th from it on. BITS: x and w come as bytes."""
    number = tl.program_id(0)
    beyond = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N) if PERSISTENT else number + 1
    for each in tl.range(number, beyond, tl.num_programs(0), flatten=PERSISTENT):
        down, right = place(each, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = down * BLOCK_M, right * BLOCK_N
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        acc = _sums(x, w, row, col, m, n, k, x_stride, w_stride, BITS, BLOCK_M, BLOCK_N, BLOCK_K, TMA)
        factor = tl.load(x_scale).to(tl.float32) * (_SHIFT * _SHIFT if BITS else 1.0)
        scale = factor * tl.load(w_scale + cols, mask=cols < n, other=0.0)
        finish(
            acc * scale[None, :], rows, cols, m, n,
            bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
            RANK, RANK_BLOCK, ACT, ONE_SAMPLE, LOW, HIGH, FP8,
        )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: Weight,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor | None,
    epilogue: Epilogue,
    config: Config | None = None,
    bits: bool | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) by the kernel; x_zero is None. bits: multiply as float16, by default where the device has no FP8."""
    if weight.group:
        return reference(x, weight, x_scale, x_zero, epilogue)
    (m, k), n = x.shape, weight.n
    if config is None:
        config = _config.config(
            "linear_fp8", lambda one: launch(x, weight, x_scale, x_zero, epilogue, one, bits),
            m=m, n=n, k=k, **epilogue.kinds,
        )  # fmt: skip
    if bits is None:
        bits = not has_float8()
    x = x.contiguous()
    config = {**config, "TMA": int(config["TMA"] and whole(x) and not bits)}
    y, q = epilogue.outputs(m, n, x.device)
    if m and n:
        left, right = (x.view(torch.uint8), weight.data.view(torch.uint8)) if bits else (x, weight.data)
        depth = config["BLOCK_K"]
        _kernel[grid(m, n, config, x.device)](
            operand(left, config["BLOCK_M"], depth, config), operand(right, config["BLOCK_N"], depth, config),
            weight.scale, x_scale, m, n, k, x.stride(0), right.shape[1], **epilogue.arguments(y, q, m),
            BITS=bits, **config, enable_fp_fusion=True,
        )  # fmt: skip
    return y, q


def has_float8() -> bool:
    """Does the device that kernels are chosen for multiply E4M3?"""
    return _config.capability() >= (8, 9)


def reference(
    x: torch.Tensor, weight: Weight, x_scale: torch.Tensor, x_zero: torch.Tensor | None, epilogue: Epilogue
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(y, q) in plain torch, float32."""
    return epilogue.reference(x.float() @ weight.values() * x_scale)
