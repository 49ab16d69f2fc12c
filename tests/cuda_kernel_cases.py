"""Programs that launch each kernel once, at shapes of Wan-1.3B and 14B, on meta tensors: for compiling, not running.

A case names the tensor-core instructions that its kernel was written for on sm_90.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

WGMMA_INT8 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
WGMMA_FP8 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3"
WGMMA_BF16 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16"
WGMMA_FP16 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16"

# 8-bit wgmma has K-major operands only: another is turned around by Triton, byte by byte, in every step.
BYTE_BY_BYTE = r"st\.shared\.b8"

BF16 = torch.bfloat16
FLOAT, STREAM = torch.float16, torch.float32  # between kernels, and along the residual stream, unless told otherwise
TOKENS = 32_760  # 21 frames of 30 by 52 latents
SMALL, WIDE, LARGE = 1_536, 8_960, 5_120


@dataclass(frozen=True)
class Case:
    program: Callable[[], object]
    forms: tuple[str, ...] = ()
    never: tuple[str, ...] = (BYTE_BY_BYTE,)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _quant(fp8: bool = False, zero: bool = True) -> Any:
    from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant

    row = meta(64)  # scales are views into the row of a bin: any alignment
    if fp8:
        return Quant(row[5:6], None, 0, 0, FLOAT8)
    return Quant(row[3:4], row[7:8] if zero else None, -128, 127, torch.int8)


def _linear(
    kind: str, m: int = TOKENS, k: int = SMALL, n: int = SMALL, group: int = 0, codes: bool = True,
    dtype: torch.dtype = FLOAT, **more: Any,
) -> object:  # fmt: skip
    from vdq_export.targets.cuda.kernels._quant import FLOAT8
    from vdq_export.targets.cuda.kernels._weight import Weight
    from vdq_export.targets.cuda.kernels.linear import linear

    stored = FLOAT8 if kind == "fp8" else torch.int8
    scale = meta(-(-k // group), n) if group else meta(n)
    weight = Weight.prepare(meta(k, n, dtype=stored), scale, group, kind, "meta")  # type: ignore[arg-type]
    row, given = meta(64), {"bias": meta(n), "dtype": dtype, **more}
    if not codes:
        return linear(meta(m, k, dtype=BF16 if dtype == BF16 else FLOAT), weight, **given)
    zero = None if kind == "fp8" else row[2:3]
    return linear(meta(m, k, dtype=stored), weight, row[1:2], zero, **given)


def _up(kind: str, fp8: bool = False, **more: Any) -> object:
    """The first linear of a feed-forward: the quantizer of the second rides in its epilogue."""
    return _linear(kind, n=WIDE, act="gelu_tanh", quant=_quant(fp8), keep=False, **more)


def _out(
    kind: str, n: int = LARGE, stream: torch.dtype = STREAM, dtype: torch.dtype = STREAM, rank: int = 0, **more: Any
) -> object:
    """A linear back into the stream: gate and residual. dtype: of what it gives."""
    if rank:
        low = BF16 if dtype == BF16 else FLOAT
        more |= {"low": meta(TOKENS, rank, dtype=low), "up": meta(rank, n, dtype=low)}
    given = {"k": n, "gate": meta(1, n), "residual": meta(TOKENS, n, dtype=stream), **more}
    return _linear(kind, n=n, dtype=dtype, **given)  # type: ignore[arg-type]


def _low_rank(kind: str, rank: int = 32, **more: Any) -> object:
    low, up = meta(TOKENS, rank, dtype=FLOAT), meta(rank, SMALL, dtype=FLOAT)
    return _linear(kind, low=low, up=up, **more)


def _normalize(k: int = SMALL, fp8: bool = False, dtype: torch.dtype = STREAM, **more: Any) -> object:
    from vdq_export.targets.cuda.kernels.normalize import normalize

    kinds = {"norm": "layer", "scale": meta(1, k), "shift": meta(1, k), "quant": _quant(fp8), "keep": False}
    return normalize(meta(TOKENS, k, dtype=dtype), **{**kinds, **more})  # type: ignore[arg-type]


def _attention(
    d: int = 128, fp8: bool = True, keys: int = TOKENS, dtype: torch.dtype = FLOAT, codes: bool = False, **more: Any
) -> object:
    from vdq_export.targets.cuda.kernels._quant import FLOAT8
    from vdq_export.targets.cuda.kernels.attention import attention

    heads = SMALL // d
    q, k = (meta(1, length, SMALL, dtype=torch.int8) for length in (TOKENS, keys))
    v = meta(1, keys, SMALL, dtype=FLOAT8 if fp8 else dtype)
    given = {"quant": _quant(), "keep": False} if codes else {}
    scales = {"q_scale": meta(heads), "k_scale": meta(heads), "v_scale": meta(heads) if fp8 else None}
    return attention(q, k, v, heads=heads, scale=d**-0.5, dtype=dtype, **{**scales, **given, **more})  # type: ignore[arg-type]


def _rope(heads: int = 12, d: int = 128, dtype: torch.dtype = FLOAT, **more: Any) -> object:
    from vdq_export.targets.cuda.kernels.rope import rope

    angles = {name: meta(TOKENS, d // 2) for name in ("cos", "sin")}
    given = {"norm": "rms", "weight": meta(heads * d), "epsilon": 1e-6, "interleaved": True, **angles}
    return rope(meta(1, TOKENS, heads * d, dtype=dtype), heads=heads, dtype=dtype, **{**given, **more})  # type: ignore[arg-type]


def _values(heads: int = 12, d: int = 128) -> object:
    """Codes of the values of an attention: nothing is normalized, nothing turns."""
    from vdq_export.targets.cuda.kernels._quant import FLOAT8

    alone = {"norm": "none", "weight": None, "cos": None, "sin": None}
    return _rope(heads, d, **alone, scale=meta(heads), codes=FLOAT8)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "int8": Case(partial(_up, "int8"), (WGMMA_INT8,)),
    "int8 gate residual": Case(partial(_out, "int8"), (WGMMA_INT8,)),
    "int8 gate residual 1536": Case(partial(_out, "int8", SMALL), (WGMMA_INT8,)),
    "int8 gate residual 3072": Case(partial(_out, "int8", 3072), (WGMMA_INT8,)),
    "int8 gate residual bf16": Case(partial(_out, "int8", SMALL, BF16, BF16), (WGMMA_INT8,)),
    "int8 float16 in the stream": Case(partial(_out, "int8", SMALL, FLOAT), (WGMMA_INT8,)),
    "int8 low rank": Case(partial(_low_rank, "int8"), (WGMMA_INT8,)),
    "int8 low rank residual": Case(partial(_out, "int8", SMALL, rank=32), (WGMMA_INT8,)),
    "int8 low rank 128": Case(partial(_out, "int8", rank=128), (WGMMA_INT8,)),
    "int8 two samples": Case(partial(_out, "int8", SMALL, gate=meta(2, SMALL)), (WGMMA_INT8,)),
    "int8 prompt": Case(partial(_linear, "int8", m=512), (WGMMA_INT8,)),
    "int8 time": Case(partial(_linear, "int8", m=1), (WGMMA_INT8,)),
    "int8 groups of 128": Case(partial(_up, "int8", group=128), (WGMMA_INT8,)),
    "int8 groups of 32": Case(partial(_out, "int8", group=32), (WGMMA_INT8,)),
    "int4": Case(partial(_up, "int4"), (WGMMA_INT8,)),
    "int4 gate residual": Case(partial(_out, "int4"), (WGMMA_INT8,)),
    "int4 float16 in the stream": Case(partial(_out, "int4", SMALL, FLOAT), (WGMMA_INT8,)),
    "int4 low rank": Case(partial(_low_rank, "int4", group=64), (WGMMA_INT8,)),
    "int4 low rank residual": Case(partial(_out, "int4", rank=32), (WGMMA_INT8,)),
    "int4 groups low rank residual": Case(partial(_out, "int4", rank=32, group=64), (WGMMA_INT8,)),
    "int4 prompt": Case(partial(_linear, "int4", m=512), (WGMMA_INT8,)),
    "int4 time": Case(partial(_linear, "int4", m=1), (WGMMA_INT8,)),
    "int4 groups of 128": Case(partial(_out, "int4", group=128), (WGMMA_INT8,)),
    "int4 groups of 32": Case(partial(_up, "int4", group=32), (WGMMA_INT8,)),
    "fp8": Case(partial(_up, "fp8", fp8=True), (WGMMA_FP8,)),
    "fp8 gate residual": Case(partial(_out, "fp8"), (WGMMA_FP8,)),
    "fp8 gate residual bf16": Case(partial(_out, "fp8", stream=BF16, dtype=BF16), (WGMMA_FP8,)),
    "fp8 low rank 128": Case(partial(_out, "fp8", rank=128), (WGMMA_FP8,)),
    "fp8 prompt": Case(partial(_linear, "fp8", m=512), (WGMMA_FP8,)),
    "fp8 time": Case(partial(_linear, "fp8", m=1), (WGMMA_FP8,)),
    "weight-only int8": Case(partial(_out, "int8", codes=False), (WGMMA_FP16,)),
    "weight-only int8 bf16": Case(partial(_out, "int8", stream=BF16, dtype=BF16, codes=False), (WGMMA_BF16,)),
    "weight-only int8 groups": Case(partial(_linear, "int8", codes=False, group=128), (WGMMA_FP16,)),
    "weight-only int4": Case(partial(_out, "int4", codes=False), (WGMMA_FP16,)),
    "weight-only int4 low rank": Case(partial(_out, "int4", codes=False, rank=32), (WGMMA_FP16,)),
    "weight-only int4 groups": Case(partial(_out, "int4", codes=False, group=64), (WGMMA_FP16,)),
    "weight-only int4 prompt": Case(partial(_linear, "int4", codes=False, m=512), (WGMMA_FP16,)),
    "weight-only int4 time": Case(partial(_linear, "int4", codes=False, m=1), (WGMMA_FP16,)),
    "normalize": Case(_normalize),
    "normalize float16": Case(partial(_normalize, dtype=FLOAT)),
    "normalize fp8": Case(partial(_normalize, LARGE, fp8=True)),
    "normalize low rank": Case(partial(_normalize, smooth=meta(SMALL), down=meta(SMALL, 32, dtype=FLOAT))),
    "normalize low rank 5120": Case(partial(_normalize, LARGE, smooth=meta(LARGE), down=meta(LARGE, 32, dtype=FLOAT))),
    "normalize hadamard 128": Case(partial(_normalize, hadamard=128)),
    "normalize hadamard 1536": Case(partial(_normalize, hadamard=SMALL)),
    "normalize hadamard 5120": Case(partial(_normalize, LARGE, hadamard=LARGE)),
    "hadamard 8960": Case(partial(_normalize, WIDE, dtype=FLOAT, norm="none", scale=None, shift=None, hadamard=256)),
    "attention": Case(_attention, (WGMMA_INT8, WGMMA_FP8)),
    "attention codes out": Case(partial(_attention, codes=True), (WGMMA_INT8, WGMMA_FP8)),
    "attention 64": Case(partial(_attention, d=64), (WGMMA_INT8, WGMMA_FP8)),
    "attention float v": Case(partial(_attention, fp8=False), (WGMMA_INT8, WGMMA_FP16)),
    "attention float v 64": Case(partial(_attention, d=64, fp8=False, codes=True), (WGMMA_INT8, WGMMA_FP16)),
    "attention bf16 v": Case(partial(_attention, fp8=False, dtype=BF16), (WGMMA_INT8, WGMMA_BF16)),
    "attention 256": Case(partial(_attention, d=256), (WGMMA_INT8, WGMMA_FP8)),
    "attention mask": Case(partial(_attention, mask=meta(1, 1, TOKENS, TOKENS)), (WGMMA_INT8, WGMMA_FP8)),
    "attention mask float v": Case(
        partial(_attention, fp8=False, codes=True, mask=meta(1, 1, TOKENS, TOKENS)), (WGMMA_INT8, WGMMA_FP16)
    ),
    "attention prompt": Case(partial(_attention, keys=512, mask=meta(1, 1, 1, 512)), (WGMMA_INT8, WGMMA_FP8)),
    "rope": Case(_rope),
    "rope codes": Case(partial(_rope, scale=meta(12))),
    "rope values": Case(_values),
}
