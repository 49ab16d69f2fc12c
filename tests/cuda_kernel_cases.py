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
    kind: str, m: int = TOKENS, k: int = SMALL, n: int = SMALL, group: int = 0, codes: bool = True, **more: Any
) -> object:
    from vdq_export.targets.cuda.kernels._quant import FLOAT8
    from vdq_export.targets.cuda.kernels._weight import Weight
    from vdq_export.targets.cuda.kernels.linear import linear

    stored = FLOAT8 if kind == "fp8" else torch.int8
    scale = meta(-(-k // group), n) if group else meta(n)
    weight = Weight.prepare(meta(k, n, dtype=stored), scale, group, kind, "meta")  # type: ignore[arg-type]
    row = meta(64)
    bias = meta(n)
    if not codes:
        return linear(meta(m, k, dtype=torch.bfloat16), weight, bias=bias, **more)
    zero = None if kind == "fp8" else row[2:3]
    return linear(meta(m, k, dtype=stored), weight, row[1:2], zero, bias=bias, **more)


def _up(kind: str, fp8: bool = False, **more: Any) -> object:
    """The first linear of a feed-forward: the quantizer of the second rides in its epilogue."""
    return _linear(kind, n=WIDE, act="gelu_tanh", quant=_quant(fp8), keep=False, **more)


def _out(kind: str, m: int = TOKENS, n: int = LARGE, **more: Any) -> object:
    """A linear back into the stream: gate and residual."""
    stream = meta(m, n, dtype=torch.bfloat16)
    return _linear(kind, m, LARGE, n, gate=meta(1, n), residual=stream, **more)


def _low_rank(kind: str, rank: int = 32, **more: Any) -> object:
    low, up = meta(TOKENS, rank, dtype=torch.bfloat16), meta(rank, SMALL, dtype=torch.bfloat16)
    return _linear(kind, low=low, up=up, **more)


CASES: dict[str, Case] = {
    "int8": Case(partial(_up, "int8"), (WGMMA_INT8,)),
    "int8 gate residual": Case(partial(_out, "int8"), (WGMMA_INT8,)),
    "int8 low rank": Case(partial(_low_rank, "int8"), (WGMMA_INT8,)),
    "int8 prompt": Case(partial(_linear, "int8", m=512), (WGMMA_INT8,)),
    "int8 time": Case(partial(_linear, "int8", m=1), (WGMMA_INT8,)),
    "int8 groups of 128": Case(partial(_up, "int8", group=128), (WGMMA_INT8,)),
    "int8 groups of 32": Case(partial(_out, "int8", group=32), (WGMMA_INT8,)),
    "int4": Case(partial(_up, "int4"), (WGMMA_INT8,)),
    "int4 low rank": Case(partial(_low_rank, "int4", group=64), (WGMMA_INT8,)),
    "int4 prompt": Case(partial(_linear, "int4", m=512), (WGMMA_INT8,)),
    "int4 time": Case(partial(_linear, "int4", m=1), (WGMMA_INT8,)),
    "int4 groups of 128": Case(partial(_out, "int4", group=128), (WGMMA_INT8,)),
    "int4 groups of 32": Case(partial(_up, "int4", group=32), (WGMMA_INT8,)),
}
