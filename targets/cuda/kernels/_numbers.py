"""Number formats on the device, and in Triton's interpreter, which of bfloat16 and float8 knows only the bits.

Up to Triton 3.9 the interpreter multiplies bfloat16 matrices as if their bits were integers, cuts float32 off instead
of rounding it to bfloat16, and loses the carry of a rounding to float8. What is compiled is one instruction each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _backend

INTERPRETED = tl.constexpr(_backend.INTERPRETED)
_SUBNORMAL = tl.constexpr(24576.0)  # 1.5 · 2^14: steps of 2^-9, those of float8e4m3fn below 2^-6


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
def to_float8(v):
    """float32 in [−448, 448] as float8e4m3fn, to nearest even."""
    if INTERPRETED:
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        rounded = (bits & -1048576).to(tl.float32, bitcast=True)
        v = tl.where(tl.abs(v) < 0.015625, (v + _SUBNORMAL) - _SUBNORMAL, rounded)
    return v.to(tl.float8e4nv)
