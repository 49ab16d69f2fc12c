"""Normalization and rotary position embedding of q or k in one pass, then floats or codes for the attention.

    n = x · weight / rms(x)                          rms: over all H·D channels; rms_head: over the D of each head
      = (x − mean(x)) · weight / std(x) + bias       layer_head: over the D of each head
      = x                                            none
    r[i] = n[i]·cos[s, f] − n[j]·sin[s, f]           i, j: the two channels of pair f, R/2 pairs, of token s
    r[j] = n[j]·cos[s, f] + n[i]·sin[s, f]           half-split: f and R/2 + f; interleaved: 2f and 2f + 1
    y = r, or codes, one scale a head: clip(round_half_even(r / scale[h]), −128, 127) in int8,
        clip(r / scale[h], −448, 448) to the nearest float8e4m3fn

Channels from R on are copied. All of it float32.

Layouts: x[B, S, H·D], any row stride; cos, sin[S, R/2]; weight, bias[H·D], or [D] for every head; y[B, S, H·D].

A program takes whole tokens, [BLOCK_M, heads, D], since the norm may run over all of a token. A channel's partner is
read a second time, from L1: turning pairs around in registers would go through shared memory.
Floor, Wan-1.3B: 32,760 x 1,536 channels, 2 bytes in and 1 out: 0.15 GB, 0.03 ms at 4.8 TB/s; three kernels with floats
between them move four times as much.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._backend import blocks, power_of_two, runs_triton
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import divide
from vdq_export.targets.cuda.kernels._numbers import float8_bits, narrow, to_float8
from vdq_export.targets.cuda.kernels._quant import FLOAT8

NORMS = ("none", "rms", "rms_head", "layer_head")
LIMITS = {torch.int8: (-128, 127), FLOAT8: (-448, 448)}
CHANNELS_A_WARP = 512  # 16 a lane: input, partner, cosine and sine of each stay in registers
MOST_WARPS = 16

_LEAST, _GREATEST = (tl.constexpr(float(limit)) for limit in LIMITS[torch.int8])
_FLOAT8_MAX = tl.constexpr(float(LIMITS[FLOAT8][1]))
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: a float32 this large has steps of one


def rope(
    x: torch.Tensor, *, heads: int, norm: str = "none", weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, epsilon: float = 0.0, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, interleaved: bool = False, scale: torch.Tensor | None = None,
    codes: torch.dtype = torch.int8, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """y[B, S, H·D] of x[B, S, H·D]: `codes` (int8, float8) with scale[H], else floats in `dtype`."""
    _check(x, heads, weight, bias, cos, sin, scale)
    run = launch if runs_triton(x) and x.numel() else reference
    return run(x, heads=heads, norm=norm, weight=weight, bias=bias, epsilon=epsilon, cos=cos, sin=sin,
               interleaved=interleaved, scale=scale, codes=codes, dtype=dtype)  # fmt: skip


def _check(x: torch.Tensor, heads: int, *operands: torch.Tensor | None) -> None:
    """Shapes: a kernel would read beside a tensor that is too small."""
    weight, bias, cos, sin, scale = operands
    length, width = x.shape[1:]
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and one.numel() not in (width, width // heads):
            raise ValueError(f"{name} of {one.numel()} for {heads} heads of {width // heads} channels")
    if scale is not None and scale.numel() != heads:
        raise ValueError(f"{scale.numel()} scales for {heads} heads")
    if cos is None or sin is None:
        return
    if cos.shape != sin.shape or cos.ndim != 2 or len(cos) != length or 2 * cos.shape[1] > width // heads:
        raise ValueError(f"cos{list(cos.shape)}, sin{list(sin.shape)} for x{list(x.shape)}, {heads} heads")


def reference(
    x: torch.Tensor, *, heads: int, norm: str = "none", weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, epsilon: float = 0.0, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, interleaved: bool = False, scale: torch.Tensor | None = None,
    codes: torch.dtype = torch.int8, dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """The same in plain torch."""
    v = _normed(x.float().unflatten(2, (heads, -1)), norm, epsilon)
    if weight is not None:
        v = v * weight.float().reshape(-1, v.shape[3])
    if bias is not None:
        v = v + bias.float().reshape(-1, v.shape[3])
    if cos is not None and sin is not None:
        v = _rotated(v, cos.float().unsqueeze(1), sin.float().unsqueeze(1), interleaved)
    if scale is None:
        return v.flatten(2).to(dtype)
    quotient = v / scale.reshape(-1, 1)
    quotient = quotient.round() if codes == torch.int8 else quotient
    return quotient.clamp(*LIMITS[codes]).to(codes).flatten(2)


def _normed(v: torch.Tensor, norm: str, epsilon: float) -> torch.Tensor:
    """v[B, S, H, D]."""
    if norm == "none":
        return v
    if norm == "layer_head":
        return F.layer_norm(v, v.shape[3:], eps=epsilon)
    return v / (v.square().mean((2, 3) if norm == "rms" else 3, keepdim=True) + epsilon).sqrt()


def _rotated(v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """v[B, S, H, D], its first R channels in pairs turned by the angles of cos, sin[S, 1, R/2]."""
    half = cos.shape[2]
    rest = v[..., 2 * half :]
    first, second = (v[..., 0 : 2 * half : 2], v[..., 1 : 2 * half : 2]) if interleaved else (
        v[..., :half], v[..., half : 2 * half])  # fmt: skip
    pair = first * cos - second * sin, second * cos + first * sin
    turned = torch.stack(pair, -1).flatten(3) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest), -1)


@triton.jit
def _affine(v, weight, bias, h, d, inside, D: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr):
    """v·weight + bias of the channels h, d; of each D for every head, or all H·D."""
    if weight is not None:
        v *= tl.load(weight + (h * D + d if WEIGHTS > D else d), mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + (h * D + d if BIASES > D else d), mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _statistics(v, inside, epsilon, NORM: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr):
    """What to subtract from v[tokens, heads, D] and what to multiply with; padding of v is zero."""
    mean = 0.0
    if NORM == "rms":
        square = tl.sum(tl.sum(v * v, 2), 1) / (HEADS * D)
        factor = tl.math.rsqrt(square + epsilon)[:, None, None]
    elif NORM == "rms_head":
        factor = tl.math.rsqrt(tl.sum(v * v, 2) / D + epsilon)[:, :, None]
    elif NORM == "layer_head":
        mean = (tl.sum(v, 2) / D)[:, :, None]
        centred = tl.where(inside, v - mean, 0.0)
        factor = tl.math.rsqrt(tl.sum(centred * centred, 2) / D + epsilon)[:, :, None]
    else:
        tl.static_assert(NORM == "none", "a norm that is none of these")
        factor = 1.0
    return mean, factor


@triton.jit
def _codes(quotient, dtype: tl.constexpr):
    """int8, float8, or float8's bits where the compiler has no such type."""
    if dtype == tl.int8:
        shifted = tl.minimum(tl.maximum(quotient + _ROUND, _ROUND + _LEAST), _ROUND + _GREATEST)
        made = shifted.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        inside = tl.minimum(tl.maximum(quotient, -_FLOAT8_MAX), _FLOAT8_MAX)
        made = float8_bits(inside) if dtype == tl.uint8 else to_float8(inside)
    return made


@triton.jit(do_not_specialize_on_alignment=["scale"])
def _kernel(
    x, y, weight, bias, cos, sin, scale, tokens, length, batch_stride, row_stride, epsilon,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
    WEIGHTS: tl.constexpr, BIASES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens of all samples, counted through."""
    token = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None, None]
    h, d = tl.arange(0, BLOCK_H)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    place = token % length
    inside = (token < tokens) & (h < HEADS) & (d < D)
    start = x + (token // length).to(tl.int64) * batch_stride + place.to(tl.int64) * row_stride
    v = tl.load(start + h * D + d, mask=inside, other=0.0).to(tl.float32)
    mean, factor = _statistics(v, inside, epsilon, NORM, HEADS, D)
    v = _affine((v - mean) * factor, weight, bias, h, d, inside, D, WEIGHTS, BIASES)
    if HALF > 0:
        turned = inside & (d < 2 * HALF)
        if INTERLEAVED:
            partner, pair, first = d ^ 1, d // 2, d % 2 == 0
        else:
            partner, pair, first = tl.where(d < HALF, d + HALF, d - HALF), d % HALF, d < HALF
        other = tl.load(start + h * D + partner, mask=turned, other=0.0).to(tl.float32)
        other = _affine((other - mean) * factor, weight, bias, h, partner, turned, D, WEIGHTS, BIASES)
        known = (token < tokens) & (d < 2 * HALF)
        c = tl.load(cos + place * HALF + pair, mask=known, other=1.0).to(tl.float32)
        s = tl.load(sin + place * HALF + pair, mask=known, other=0.0).to(tl.float32)
        v = v * c + tl.where(first, -other, other) * s
    at = y + token.to(tl.int64) * (HEADS * D) + h * D + d
    if scale is not None:
        quotient = divide(v, tl.load(scale + h, mask=h < HEADS, other=1.0))
        tl.store(at, _codes(quotient, y.dtype.element_ty), mask=inside)
    else:
        tl.store(at, narrow(v, y.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor, *, heads: int, norm: str = "none", weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, epsilon: float = 0.0, cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None, interleaved: bool = False, scale: torch.Tensor | None = None,
    codes: torch.dtype = torch.int8, dtype: torch.dtype = torch.bfloat16, config: Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """y; see rope. At least one token."""
    samples, length, width = x.shape
    d = width // heads
    x = x if x.stride(2) == 1 else x.contiguous()
    if config is None:

        def run(one: Config) -> object:
            return launch(x, heads=heads, norm=norm, weight=weight, bias=bias, epsilon=epsilon, cos=cos, sin=sin,
                          interleaved=interleaved, scale=scale, codes=codes, dtype=dtype, config=one)  # fmt: skip

        config = _config.config("rope", run, m=samples * length, n=heads, k=d)
    block_m, block_h, block_d = config["BLOCK_M"], power_of_two(heads), power_of_two(d)
    warps = min(MOST_WARPS, max(config["num_warps"], block_m * block_h * block_d // CHANNELS_A_WARP))
    y = torch.empty(samples, length, width, dtype=dtype if scale is None else codes, device=x.device)
    bits = y.dtype == FLOAT8 and _config.capability() < (8, 9)
    cos, sin = (None if one is None else one.contiguous() for one in (cos, sin))
    _kernel[(blocks(samples * length, block_m),)](
        x, y.view(torch.uint8) if bits else y, weight, bias, cos, sin, scale,
        samples * length, length, x.stride(0), x.stride(1), epsilon,
        HEADS=heads, D=d, HALF=0 if cos is None else cos.shape[1], NORM=norm, INTERLEAVED=interleaved,
        WEIGHTS=0 if weight is None else weight.numel(), BIASES=0 if bias is None else bias.numel(),
        BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps, num_stages=config["num_stages"],
        enable_fp_fusion=True,
    )  # fmt: skip
    return y
