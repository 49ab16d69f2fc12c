"""Number formats on the device, and in Triton's interpreter, which of bfloat16 and float8 knows only the bits.

Up to Triton 3.9 the interpreter multiplies bfloat16 matrices as if their bits were integers, cuts float32 off instead
of rounding it to bfloat16, and loses the carry of a rounding to float8. What is compiled is one instruction each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _backend

INTERPRETED = tl.constexpr(_backend.INTERPRETED)


@triton.jit
def float_dot(a, b, acc):
    """a @ b (+ acc), float32: of 16-bit factors exactly, of float32 ones in three products of tf32. acc may be None."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc=acc, input_precision="tf32x3")


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """float32 as dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        narrowed = (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        narrowed = v.to(dtype)
    return narrowed


@triton.jit
def fused(a, b, c):
    """a · b + c, rounded once. The interpreter rounds twice, to float64 first."""
    if INTERPRETED:
        a, b, c = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64)
    return tl.fma(a, b, c).to(tl.float32)


@triton.jit
def float8_bits(v):
    """float32 in [−448, 448] as the bits of float8e4m3fn, to nearest even, where the compiler has no such type."""
    size = tl.abs(v)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # three bits of mantissa stay; 8 · (127 − 7) less
    subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 15  # 2^14 has steps of 2^-9, as float8 below 2^-6
    sign = (v.to(tl.int32, bitcast=True) >> 24) & 128
    return (tl.where(size < 0.015625, subnormal, normal) | sign).to(tl.uint8)


@triton.jit
def to_float8(v):
    """float32 in [−448, 448] as float8e4m3fn, to nearest even."""
    return float8_bits(v).to(tl.float8e4nv, bitcast=True) if INTERPRETED else v.to(tl.float8e4nv)
