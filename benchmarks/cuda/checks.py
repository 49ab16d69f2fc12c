"""Every kernel on this GPU against plain torch on the CPU, at awkward shapes: what is timed must be right first.

Floats may differ by what their own type rounds and by the order of sums; codes by one, where a value lies between two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.attention import attention
from vdq_export.targets.cuda.kernels.linear import linear
from vdq_export.targets.cuda.kernels.normalize import normalize
from vdq_export.targets.cuda.kernels.rope import rope

Made = Callable[[str], tuple[Any, ...]]  # device -> results
BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # half a step of the type
FLOAT8_BOUND = 3e-2  # P in E4M3 has 3 bits behind the point, summed over many keys
_CODES_OFF = 2e-3  # share of codes that may lie one beside


def measure() -> list[dict[str, Any]]:
    """A row a case: the largest error of its results, what is allowed, "right" or "WRONG"."""
    rows = []
    every = ((dtype, case) for dtype in BOUND for case in cases(dtype))
    for dtype, (kernel, case, made, bound) in every:
        pairs = zip(made("cuda"), made("cpu"), strict=True)
        error = max(_error(one.cpu(), other) for one, other in pairs if other is not None)
        rows.append({
            "kernel": kernel, "case": f"{case}, {str(dtype).removeprefix('torch.')}", "error": error, "bound": bound,
            "verdict": "right" if error <= bound else "WRONG",
        })  # fmt: skip
    return rows


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole; of codes: infinite where one is off by more than one or too many are off."""
    if expected.dtype == torch.int8:
        off = (found.int() - expected.int()).abs()
        return float("inf") if off.max() > 1 or (off > 0).double().mean() > _CODES_OFF else 0.0
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm()) if bool(found.isfinite().all()) else float("inf")


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, Made, float]]:
    """(kernel, case, what makes its results, bound)"""
    for kind in ("int8", "int4", "fp8"):
        for m, k, n in ((1, 64, 16), (77, 1536, 200), (300, 1531, 1537), (1024, 5120, 640)):
            for group in (0, 128) if kind != "fp8" and k % 128 == 0 else (0,):
                name = f"{m} × {k} × {n}" + (f", groups of {group}" if group else "")
                yield f"linear {kind}", name, _linear(kind, m, k, n, group, dtype), BOUND[dtype]
    for kind in ("int8", "int4"):
        yield "linear weight-only", kind, _linear(kind, 77, 1536, 200, 0, dtype, codes=False), 2 * BOUND[dtype]
    for k, block in ((1536, 0), (1531, 0), (1536, 1536), (8960, 256), (5120, 5120), (13824, 512)):
        yield "normalize", f"{k}, Hadamard {block}", _normalize(k, block, dtype), BOUND[dtype]
    for heads, d, form in ((12, 128, "int8"), (3, 72, "int8"), (12, 128, "float")):
        yield "rope", f"{heads} × {d}, {form}", _rope(heads, d, form == "int8", dtype), BOUND[dtype]
    for q, keys, d, v in ((333, 333, 128, "float"), (333, 77, 64, "float"), (1000, 2001, 128, "fp8")):
        bound = FLOAT8_BOUND if v == "fp8" else 2 * BOUND[dtype]
        yield "attention", f"{q} × {keys} × {d}, v {v}", _attention(q, keys, d, v == "fp8", dtype), bound


def _random(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def _linear(kind: str, m: int, k: int, n: int, group: int, dtype: torch.dtype, codes: bool = True) -> Made:
    def made(device: str) -> tuple[Any, ...]:
        random = _random(m + k + n)
        top = {"int8": 127, "int4": 7, "fp8": 448}[kind]
        levels = (random(k, n) / 3).clamp(-1, 1) * top
        stored = levels.to(FLOAT8) if kind == "fp8" else levels.round().to(torch.int8)
        scale = (
            random(-(-k // group), n).abs() / top / k**0.5 + 1e-4 if group else random(n).abs() / top / k**0.5 + 1e-4
        )
        weight = Weight.prepare(stored, scale, group, kind, device)  # type: ignore[arg-type]
        more = {
            "bias": random(n), "gate": random(1, n), "residual": random(m, n), "act": "gelu_tanh",
            "low": random(m, 16).to(dtype), "up": random(16, n).to(dtype) / 16,
        }  # fmt: skip
        given = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in more.items()}
        x = random(m, k)
        if not codes:
            return linear(x.to(dtype).to(device), weight, dtype=dtype, **given)  # type: ignore[arg-type]
        quant = _quant(device, fp8=kind == "fp8")
        q = quant.codes(x.to(device))
        return linear(q, weight, quant.scale, quant.zero, quant=_quant(device), dtype=dtype, **given)  # type: ignore[arg-type]

    return made


def _quant(device: str, fp8: bool = False) -> Quant:
    if fp8:
        return Quant(torch.tensor([1 / 64], device=device), None, 0, 0, FLOAT8)
    return Quant(torch.tensor([0.03], device=device), torch.tensor([5.0], device=device))


def _normalize(k: int, block: int, dtype: torch.dtype) -> Made:
    def made(device: str) -> tuple[Any, ...]:
        random = _random(k)
        x, vectors = random(70, k).to(dtype).to(device), [random(2, k).to(device), random(2, k).to(device)]
        down = (random(k, 16) / k**0.5).to(dtype).to(device)
        return normalize(
            x, norm="layer", epsilon=1e-6, scale=vectors[0], shift=vectors[1], smooth=random(k).exp().to(device),
            hadamard=block, quant=_quant(device), down=down, keep=True, dtype=dtype,
        )  # fmt: skip

    return made


def _rope(heads: int, d: int, codes: bool, dtype: torch.dtype) -> Made:
    def made(device: str) -> tuple[Any, ...]:
        random = _random(heads + d)
        x, weight = random(2, 55, heads * d).to(dtype).to(device), random(heads * d).to(device)
        angle = random(55, d // 2).to(device)
        scale = torch.full((heads,), 0.03, device=device) if codes else None
        return (
            rope(
                x, heads=heads, norm="rms", weight=weight, epsilon=1e-6, cos=angle.cos(), sin=angle.sin(), scale=scale,
                dtype=dtype,
            ),
        )  # fmt: skip

    return made


def _attention(queries: int, keys: int, d: int, fp8: bool, dtype: torch.dtype) -> Made:
    def made(device: str) -> tuple[Any, ...]:
        random, heads = _random(queries + keys), 3
        q = (random(2, queries, heads * d) * 40).round().clamp(-127, 127).to(torch.int8).to(device)
        k = (random(2, keys, heads * d) * 40).round().clamp(-127, 127).to(torch.int8).to(device)
        v = random(2, keys, heads * d).to(FLOAT8 if fp8 else dtype).to(device)
        scale = torch.full((heads,), 1 / 40, device=device)
        return attention(
            q, k, v, heads=heads, scale=d**-0.5, q_scale=scale, k_scale=scale, v_scale=scale if fp8 else None,
            dtype=dtype, keep=True,
        )  # fmt: skip

    return made
