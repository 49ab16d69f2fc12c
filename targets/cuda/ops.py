"""The operators of domain "vdq.cuda": what the fused graph holds, by positional inputs and by outputs.

An absent input or output is the empty name. Weights are as the QDQ graph has them, [K, N]; integer activations are int8
codes, q − 128 where the quantizer's type is uint8, and zero points are shifted alike. What each computes stands in
kernels/: linear.py, normalize.py, rope.py, attention.py.

    Row(bins[B, P], bin[1]) -> row[P]                  the numbers of one bin
    Pick(row; offset, shape) -> value[shape]           one of them, a view
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

DOMAIN = "vdq.cuda"
BIN, BINS = "bin", "bins"
SHIFT = 128  # between a uint8 quantizer's q and the int8 code that kernels multiply
_LINE = 4  # numbers: each parameter begins on 16 bytes of the table, as kernels like their pointers

INPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "Row": ("bins", "bin"),
    "Pick": ("row",),
    "Linear": (
        "x", "weight", "weight_scale", "x_scale", "x_zero", "bias", "low", "up", "gate", "residual", "post",
        "out_scale", "out_zero",
    ),
    "Normalize": ("x", "weight", "bias", "scale", "shift", "smooth", "post", "out_scale", "out_zero", "down"),
    "Rope": ("x", "weight", "cos", "sin", "out_scale", "bias"),
    "Attention": ("q", "k", "v", "mask", "q_scale", "k_scale", "v_scale", "out_scale", "out_zero"),
})  # fmt: skip
OUTPUTS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "Row": ("row",), "Pick": ("value",), "Linear": ("y", "q"), "Normalize": ("y", "q", "low"), "Rope": ("y",),
    "Attention": ("y", "q"),
})  # fmt: skip


def line(size: int) -> int:
    """How many numbers of the table a parameter of so many takes."""
    return -(-size // _LINE) * _LINE
