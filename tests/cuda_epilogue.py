"""What follows a linear's product, in float64: what the kernels of linears are held to. Shared by their tests.

Its tolerance, 2e-5 of the largest result, is some tens of roundings of 6e-8 in sums of some ten terms (and 2 ulp of
exp). A quantized output may differ by one code where its real value lies within that tolerance of a tie.
"""

from __future__ import annotations

from itertools import cycle, product

import numpy as np
import torch

from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels._epilogue import ACTIVATIONS, Epilogue
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant

TOLERANCE = 2e-5
STEPS = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NAMES = ("bias", "low", "gate", "residual", "post")
OUTPUTS = [(True, None), (False, torch.int8), (True, torch.int8), (False, FLOAT8), (True, FLOAT8)]
ALL = [tuple(name for name, on in zip(NAMES, flags, strict=True) if on) for flags in product((0, 1), repeat=5)]
# Every set of inputs once, with activations, outputs and types in turn.
MIXED = [
    (names, act, output, dtype)
    for names, act, output, dtype in zip(
        ALL, cycle(ACTIVATIONS), cycle(OUTPUTS), cycle((torch.float32, torch.bfloat16, torch.float16)), strict=False
    )
]
Mix = tuple[tuple[str, ...], str, tuple[bool, torch.dtype | None], torch.dtype]


def epilogue_of(mix: Mix, m: int, n: int) -> Epilogue:
    """Random inputs of these names; two samples where the rows allow."""
    names, act, (keep, codes), dtype = mix
    made = torch.Generator().manual_seed(m + n + len(names))
    samples = 2 if m % 2 == 0 else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    given = {
        "bias": normal(n), "low": normal(m, 5).to(dtype), "up": normal(5, n).to(dtype), "gate": normal(samples, n),
        "residual": normal(m, n).to(dtype), "post": normal(n).abs() + 0.5,
    }  # fmt: skip
    chosen = {name: one for name, one in given.items() if name in names or (name == "up" and "low" in names)}
    zero = torch.tensor(-20.0) if codes == torch.int8 else None
    quant = None if codes is None else Quant(torch.tensor([0.031]), zero, -128, 100, codes)
    return Epilogue(act=act, keep=keep, quant=quant, dtype=dtype, **chosen)  # type: ignore[arg-type]


def followed(v: Array, epilogue: Epilogue) -> Array:
    """What the epilogue makes of v, float64, before it is narrowed or quantized."""
    given = {
        name: getattr(epilogue, name).double().numpy() for name in (*NAMES, "up") if getattr(epilogue, name) is not None
    }
    v = v + given.get("bias", 0.0)
    if "low" in given:
        v = v + given["low"] @ given["up"]
    if epilogue.act == "gelu_tanh":
        v = 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    elif epilogue.act == "gelu_erf":
        v = v * 0.5 * (1 + torch.erf(torch.from_numpy(v) / 2**0.5).numpy())
    elif epilogue.act == "silu":
        v = v / (1 + np.exp(-v))
    if "gate" in given:
        v = v * np.repeat(given["gate"], len(v) // len(given["gate"]), 0)
    return np.asarray((v + given.get("residual", 0.0)) * given.get("post", 1.0))


def check(outputs: tuple[torch.Tensor | None, torch.Tensor | None], product: Array, epilogue: Epilogue) -> None:
    """y and q against what follows the exact product[M, N]."""
    y, q = outputs
    assert (y is not None, q is not None) == (epilogue.keep, epilogue.quant is not None)
    exact = followed(product, epilogue)
    slack = TOLERANCE * max(1.0, float(np.abs(exact).max(initial=0)))
    if y is not None:
        assert (y.dtype, tuple(y.shape)) == (epilogue.dtype, exact.shape)
        off = np.abs(y.double().numpy() - exact)
        assert (off <= slack + STEPS[epilogue.dtype] * np.abs(exact)).all(), off.max()
    if q is not None and epilogue.quant is not None:
        assert (q.dtype, tuple(q.shape)) == (epilogue.quant.dtype, exact.shape)
        least, most = (epilogue.quant.codes(torch.from_numpy(exact + shift)).double() for shift in (-slack, slack))
        assert ((least <= q.double()) & (q.double() <= most)).all()
