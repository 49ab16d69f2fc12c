"""What follows a matrix product, in one pass over the tile that still lies in registers: host side and device side.

    v = product + bias + low @ up        low[M, r], up[r, N]: the low-rank branch, a float product on the tensor cores
    v = act(v)
    v = residual + gate · v              gate[B, N]: row m belongs to sample m // (M / B)
    v = v · post
    y = v in dtype,  q = quant(v)        either or both; q of the float32 v

All of it float32. Each input may be absent (None is a constant to Triton: the code for it is not made).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._backend import power_of_two
from vdq_export.targets.cuda.kernels._numbers import float8_bits, float_dot, fused, narrow, to_float8
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant

ACTIVATIONS = ("none", "gelu_tanh", "gelu_erf", "silu")
LEAST_RANK = 16  # the shortest inner dimension of tl.dot
RANKS = tl.constexpr(32)  # of the low-rank branch that are multiplied at a time

_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: a float32 this large has steps of one, its low byte is the integer's
_FAR = tl.constexpr(1024.0)  # beyond every code; keeps infinities out of products with 0
_FLOAT8_MAX = tl.constexpr(448.0)


@triton.jit
def activation(v, ACT: tl.constexpr):
    """act(v) of a float32 tile; exp and the quotient are the fast ones, 2 ulp."""
    if ACT == "gelu_tanh":  # (1 + tanh u) / 2 = 1 / (1 + exp(−2u))
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    elif ACT == "gelu_erf":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACT == "silu":
        v = v / (1.0 + tl.exp(-v))
    else:
        tl.static_assert(ACT == "none", "an activation that is none of these")
    return v


@triton.jit
def divide(v, scale):
    """v / scale for one scale, correctly rounded up to ±1024, beyond that still beyond: five instructions an element.

    A product with 1 / scale is up to two units off and rounds ties of codes elsewhere than the quotient does. One step
    with the exact remainder mends it (Markstein 1990).
    """
    inverse = tl.div_rn(1.0, scale)
    near = tl.minimum(tl.maximum(v * inverse, -_FAR), _FAR)
    return fused(fused(-near, scale, v), inverse, near)


@triton.jit
def quantize(v, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr):
    """Codes of a float32 tile. scale: pointer; zero: pointer or None. FP8: 0 int8, 1 float8, 2 float8's bits, uint8."""
    quotient = divide(v, tl.load(scale).to(tl.float32))
    if FP8:
        inside = tl.minimum(tl.maximum(quotient, -_FLOAT8_MAX), _FLOAT8_MAX)
        codes = to_float8(inside) if FP8 == 1 else float8_bits(inside)
    else:
        shifted = quotient + _ROUND  # rounded half to even by the addition; exact from here on
        if zero is not None:
            shifted += tl.load(zero).to(tl.float32)
        shifted = tl.minimum(tl.maximum(shifted, _ROUND + LOW), _ROUND + HIGH)
        codes = shifted.to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def low_rank(v, low, low_stride, up, rows, cols, m, n, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr):
    """v + low[rows] @ up[:, cols], float32. 16-bit factors exactly, float32 ones in three products of tf32.

    A few ranks at a time: all of them would take the shared memory that the next tile's blocks lie in.
    """
    WIDTH: tl.constexpr = min(RANK_BLOCK, RANKS)
    for first in tl.static_range(0, RANK_BLOCK, WIDTH):
        ranks = first + tl.arange(0, WIDTH)
        left_mask = (rows[:, None] < m) & (ranks[None, :] < RANK)
        right_mask = (ranks[:, None] < RANK) & (cols[None, :] < n)
        left = tl.load(low + rows[:, None].to(tl.int64) * low_stride + ranks[None, :], mask=left_mask, other=0.0)
        right = tl.load(up + ranks[:, None] * n + cols[None, :], mask=right_mask, other=0.0)
        if left.dtype != right.dtype:
            left, right = left.to(tl.float32), right.to(tl.float32)
        v = float_dot(left, right, v)
    return v


@triton.jit
def gated(v, gate, residual, start, inside, rows, cols, n, per_sample, ONE_SAMPLE: tl.constexpr):
    """residual + gate · v."""
    if gate is not None:
        if ONE_SAMPLE:
            v *= tl.load(gate + cols, mask=cols < n, other=0.0).to(tl.float32)[None, :]
        else:
            sample = (rows // per_sample)[:, None]
            v *= tl.load(gate + sample * n + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + start + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def finish(
    v, rows, cols, m, n,
    bias, low, low_stride, up, gate, per_sample, residual, post, out_scale, out_zero, y, q,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ACT: tl.constexpr, ONE_SAMPLE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """All of the above for the float32 tile v of these rows and columns, and its stores. Pointers may be None."""
    known = cols < n
    inside = (rows[:, None] < m) & known[None, :]
    start = rows[:, None].to(tl.int64) * n
    if bias is not None:
        v += tl.load(bias + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    if low is not None:
        v = low_rank(v, low, low_stride, up, rows, cols, m, n, RANK, RANK_BLOCK)
    v = activation(v, ACT)
    v = gated(v, gate, residual, start, inside, rows, cols, n, per_sample, ONE_SAMPLE)
    if post is not None:
        v *= tl.load(post + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    if y is not None:
        tl.store(y + start + cols[None, :], narrow(v, y.dtype.element_ty), mask=inside)
    if q is not None:
        tl.store(q + start + cols[None, :], quantize(v, out_scale, out_zero, LOW, HIGH, FP8), mask=inside)


@triton.jit
def halves(v):
    """(v[:, : N / 2], v[:, N / 2 :]); the registers of a matrix instruction's result stay where they are."""
    across: tl.constexpr = v.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(v, (v.shape[0], 2, across)), (0, 2, 1)))
    return left, right


@triton.jit
def parts(v, WIDTH: tl.constexpr):
    """v in up to four parts of WIDTH columns or more. Finished one by one, they need fewer registers beside v's own."""
    if v.shape[1] >= 4 * WIDTH:
        left, right = halves(v)
        made = halves(left) + halves(right)
    elif v.shape[1] >= 2 * WIDTH:
        made = halves(v)
    else:
        made = (v,)
    return made


def activate(v: torch.Tensor, act: str) -> torch.Tensor:
    """act(v) in plain torch."""
    if act == "none":
        return v
    if act == "silu":
        return F.silu(v)
    return F.gelu(v, approximate={"gelu_tanh": "tanh", "gelu_erf": "none"}[act])


@dataclass(frozen=True)
class Epilogue:
    """What follows the product. keep: y is wanted, in dtype; quant: q is."""

    bias: torch.Tensor | None = None
    low: torch.Tensor | None = None
    up: torch.Tensor | None = None
    act: str = "none"
    gate: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    post: torch.Tensor | None = None
    quant: Quant | None = None
    keep: bool = True
    dtype: torch.dtype = torch.bfloat16

    def reference(self, v: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(y, q) of the product v[M, N], float32, in plain torch."""
        if self.bias is not None:
            v = v + self.bias.float()
        if self.low is not None and self.up is not None:
            v = v + self.low.float() @ self.up.float()
        v = activate(v, self.act)
        if self.gate is not None:
            per_sample = v.shape[0] // self.gate.shape[0]
            v = v * self.gate.float().repeat_interleave(per_sample, 0)
        if self.residual is not None:
            v = v + self.residual.float()
        if self.post is not None:
            v = v * self.post.float()
        return v.to(self.dtype) if self.keep else None, None if self.quant is None else self.quant.codes(v)

    @property
    def kinds(self) -> dict[str, int | bool]:
        """What the tables of configurations may ask: what else lies in registers beside the tile."""
        return {"low": self.low is not None, "residual": 0 if self.residual is None else self.residual.element_size()}

    def outputs(self, m: int, n: int, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(y, q), not yet written."""
        y = torch.empty(m, n, dtype=self.dtype, device=device) if self.keep else None
        return y, None if self.quant is None else torch.empty(m, n, dtype=self.quant.dtype, device=device)

    def arguments(self, y: torch.Tensor | None, q: torch.Tensor | None, m: int) -> dict[str, object]:
        """The arguments of `finish` from bias on, by name; kernels hand them on under the same names."""
        samples = 1 if self.gate is None else self.gate.shape[0]
        rank = 0 if self.low is None else self.low.shape[-1]
        low = self.low if self.low is None or self.low.stride(-1) == 1 else self.low.contiguous()
        quant = self.quant
        form = code_form(quant)
        return {
            "bias": _flat(self.bias), "low": low, "low_stride": 0 if low is None else low.stride(0),
            "up": _flat(self.up), "gate": _flat(self.gate), "per_sample": max(1, m // samples),
            "residual": _flat(self.residual), "post": _flat(self.post),
            "out_scale": None if quant is None else quant.scale, "out_zero": None if quant is None else quant.zero,
            "y": y, "q": stored(q, form),
            "RANK": rank, "RANK_BLOCK": power_of_two(rank, LEAST_RANK), "ACT": self.act,
            "ONE_SAMPLE": samples == 1, "LOW": 0 if quant is None else quant.low,
            "HIGH": 0 if quant is None else quant.high, "FP8": form,
        }  # fmt: skip


def code_form(quant: Quant | None) -> int:
    """FP8 of `quantize`: 0 int8 codes, or none; 1 float8; 2 its bits, for devices whose Triton has no such type."""
    if quant is None or quant.dtype != FLOAT8:
        return 0
    return 1 if _config.capability() >= (8, 9) else 2


def stored(codes: torch.Tensor | None, form: int) -> torch.Tensor | None:
    """The codes as a kernel stores them."""
    return codes if codes is None or form < 2 else codes.view(torch.uint8)


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
