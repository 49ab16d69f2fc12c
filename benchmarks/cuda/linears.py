"""INT8 linears with the quantization of their input, against cuBLAS in bfloat16, on random data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cuda.timing import alternating, captured
from vdq_export.targets.cuda.kernels._quant import Quant
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.linear import linear
from vdq_export.targets.cuda.kernels.normalize import normalize

ROWS = 32_760  # tokens of Wan at 480 × 832 × 81
SHAPES = ((1536, 1536), (1536, 8960), (8960, 1536), (5120, 5120), (5120, 13824), (13824, 5120))
LARGE = 5120 * 5120
INT8_PEAK = {"NVIDIA H100": 1979e12, "NVIDIA H200": 1979e12}  # dense operations a second, NVIDIA's data sheets
GOALS = {False: 1.5, True: 1.65}


def measure(rows: int = ROWS, shapes: tuple[tuple[int, int], ...] = SHAPES) -> list[dict[str, Any]]:
    """One row for each (K, N): milliseconds, ratio to bfloat16, operations a second."""
    return [_one(rows, k, n) for k, n in shapes]


def _one(m: int, k: int, n: int) -> dict[str, Any]:
    random = torch.Generator("cuda").manual_seed(k + n)
    x = torch.randn(m, k, generator=random, device="cuda").bfloat16()
    w = torch.randn(n, k, generator=random, device="cuda").bfloat16() / k**0.5
    bias = torch.randn(n, generator=random, device="cuda").bfloat16()
    scale = w.abs().amax(1).float() / 127
    codes = (w.float() / scale[:, None]).round().to(torch.int8).t().contiguous()
    weight = Weight.prepare(codes, scale, 0, "int8", "cuda")
    quant = Quant(torch.tensor([8 / 255], device="cuda"), torch.tensor([3.0], device="cuda"))
    float_bias = bias.float()

    def ours() -> torch.Tensor:
        _, q, _ = normalize(x, norm="none", epsilon=0.0, quant=quant, keep=False, dtype=torch.bfloat16)
        y, _ = linear(q, weight, quant.scale, quant.zero, bias=float_bias, dtype=torch.bfloat16)
        return y

    def product() -> torch.Tensor:
        return linear(q, weight, quant.scale, quant.zero, bias=float_bias, dtype=torch.bfloat16)[0]

    q = normalize(x, norm="none", epsilon=0.0, quant=quant, keep=False, dtype=torch.bfloat16)[1]
    error = _error(ours(), F.linear(quant.values(q), weight.values().t(), float_bias))
    runs = {
        "bf16": captured(lambda: F.linear(x, w, bias)),
        "int8": captured(ours),
        "int8 product": captured(product),
    }
    times = alternating(runs)
    operations = 2 * m * k * n
    return {
        "k": k, "n": n, "ms": times, "error": error,
        "ratio": times["bf16"] / times["int8"], "goal": GOALS[k * n >= LARGE],
        "tops": operations / times["int8"] / 1e9, "product_tops": operations / times["int8 product"] / 1e9,
        "bf16_tflops": operations / times["bf16"] / 1e9,
    }  # fmt: skip


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole result: bfloat16 rounds each number by 2⁻⁹ of itself at most."""
    return float((found.float() - expected).norm() / expected.norm())
