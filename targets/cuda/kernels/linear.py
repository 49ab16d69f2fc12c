"""Linears of every kind: which kernel computes one. What they compute stands in those files and in _epilogue.py.

x                weight          kernel
int8 codes       int8            linear_int8            W8A8, per channel or in groups
int8 codes       int4            linear_int4            W4A8, W4A4 (whose codes have few levels)
float8 codes     fp8             linear_fp8
float            int8, int4      linear_weight_only     the weight is dequantized on its way to the tensor cores
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from vdq_export.targets.cuda.kernels._backend import runs_triton
from vdq_export.targets.cuda.kernels._epilogue import ACTIVATIONS, Epilogue
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels._weight import Weight

Outputs = tuple[torch.Tensor | None, torch.Tensor | None]
_CODES = {(torch.int8, "int8"): "linear_int8", (torch.int8, "int4"): "linear_int4", (FLOAT8, "fp8"): "linear_fp8"}


def linear(
    x: torch.Tensor,
    weight: Weight,
    x_scale: torch.Tensor | None = None,
    x_zero: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    act: str = "none",
    gate: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    post: torch.Tensor | None = None,
    quant: Quant | None = None,
    keep: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Outputs:
    """(y[M, N] or None, codes q[M, N] or None) of x[M, K] and what follows it (Epilogue); x codes: with their x_scale.

    Raises ValueError for shapes or types that no kernel has.
    """
    epilogue = Epilogue(
        bias=bias, low=low, up=up, act=act, gate=gate, residual=residual, post=post, quant=quant, keep=keep, dtype=dtype
    )
    kernel = _kernel(x, weight, x_scale)
    _check(x, weight, epilogue)
    if x.shape[0] == 0:
        return epilogue.outputs(0, weight.n, x.device)
    run: Callable[..., Outputs] = kernel.launch if runs_triton(x) else kernel.reference
    x = x.contiguous()
    if x_scale is None:
        return run(x, weight, epilogue)
    return run(x, weight, x_scale, x_zero, epilogue)


def _kernel(x: torch.Tensor, weight: Weight, x_scale: torch.Tensor | None) -> ModuleType:
    """Imported when first wanted."""
    if x_scale is None and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and weight.kind != "fp8":
        name: str | None = "linear_weight_only"
    else:
        name = None if x_scale is None else _CODES.get((x.dtype, weight.kind))
    if name is None:
        scaled = "without a scale" if x_scale is None else "with a scale"
        raise ValueError(f"no kernel multiplies {x.dtype} {scaled} by {weight.kind} weights")
    return import_module(f"{__package__}.{name}")


def _check(x: torch.Tensor, weight: Weight, epilogue: Epilogue) -> None:
    """Shapes: a kernel would read beside a tensor that is too small."""
    if x.ndim != 2 or x.shape[1] != weight.k:
        raise ValueError(f"x{list(x.shape)} for a weight of [{weight.k}, {weight.n}]")
    if epilogue.act not in ACTIVATIONS:
        raise ValueError(f"activation {epilogue.act!r} is none of {', '.join(ACTIVATIONS)}")
    m, n = x.shape[0], weight.n
    rank = None if epilogue.low is None else epilogue.low.shape[-1]
    if (epilogue.low is None) != (epilogue.up is None):
        raise ValueError("low and up come together")
    samples = 1 if epilogue.gate is None else epilogue.gate.shape[0]
    expected = {
        "bias": (n,), "low": (m, rank), "up": (rank, n), "gate": (samples, n), "residual": (m, n), "post": (n,)
    }  # fmt: skip
    for name, shape in expected.items():
        given = getattr(epilogue, name)
        if given is not None and tuple(given.shape) != shape:
            raise ValueError(f"{name} is {list(given.shape)}, not {list(shape)}")
    if m % max(1, samples):
        raise ValueError(f"{m} rows are not {samples} samples of equal length")
