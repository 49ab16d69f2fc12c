"""QuantizeLinear, DequantizeLinear and Cast in torch.

4-bit types have no arrays: their values lie in int8 and uint8, and the ONNX type only bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """How torch holds an ONNX type; low, high: the bounds of an integer that is quantized to, or of float8."""

    dtype: torch.dtype
    low: float = 0
    high: float = 0


TYPES: dict[int, Stored] = {
    TensorProto.FLOAT: Stored(torch.float32),
    TensorProto.FLOAT16: Stored(torch.float16),
    TensorProto.BFLOAT16: Stored(torch.bfloat16),
    TensorProto.DOUBLE: Stored(torch.float64),
    TensorProto.BOOL: Stored(torch.bool),
    TensorProto.INT64: Stored(torch.int64),
    TensorProto.INT32: Stored(torch.int32),
    TensorProto.UINT32: Stored(torch.uint32),
    TensorProto.UINT64: Stored(torch.uint64),
    TensorProto.INT16: Stored(torch.int16, -32768, 32767),
    TensorProto.UINT16: Stored(torch.uint16, 0, 65535),
    TensorProto.INT8: Stored(torch.int8, -128, 127),
    TensorProto.UINT8: Stored(torch.uint8, 0, 255),
    TensorProto.INT4: Stored(torch.int8, -8, 7),
    TensorProto.UINT4: Stored(torch.uint8, 0, 15),
    TensorProto.FLOAT8E4M3FN: Stored(torch.float8_e4m3fn, -448, 448),
    TensorProto.FLOAT8E5M2: Stored(torch.float8_e5m2, -57344, 57344),
}
_OF_ZERO = {TYPES[code].dtype: TYPES[code] for code in (
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
)}  # fmt: skip


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0,
    saturate: int = 1, precision: int = 0,
) -> Tensor:  # fmt: skip
    """clip(round_half_even(x / scale) + zero); float8: clip(x / scale), to the nearest number, ties to even.

    output_dtype: also where the zero point is a constant, whose 4-bit type a tensor does not show (lower.py).
    """
    kind = TYPES[output_dtype] if output_dtype else _OF_ZERO[torch.uint8 if zero is None else zero.dtype]
    scaled = x.float() / _spread(scale.float(), x, axis, block_size)
    if not kind.dtype.is_floating_point:
        scaled = scaled.round()
        if zero is not None:
            scaled = scaled + _spread(zero.float(), x, axis, block_size)
    return scaled.clamp(kind.low, kind.high).to(kind.dtype)


def dequantize(
    q: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """(q − zero) · scale, in float32. int32 values beyond 2²⁴ keep their digits until they are multiplied."""
    if q.dtype == torch.int32:
        shifted = q if zero is None else q - _spread(zero, q, axis, block_size)
        return (shifted.double() * _spread(scale.double(), q, axis, block_size)).float()
    shifted = q.float()
    if zero is not None:
        shifted = shifted - _spread(zero.float(), q, axis, block_size)
    return shifted * _spread(scale.float(), q, axis, block_size)


def _spread(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """One for all, one a channel of `axis` or one a block of it, in a shape that broadcasts to x's."""
    if parameter.ndim == 0:
        return parameter
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if parameter.numel() == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    kind = TYPES[to]
    if kind.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and saturate:
        return x.float().clamp(kind.low, kind.high).to(kind.dtype)
    return x.to(kind.dtype)


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)
