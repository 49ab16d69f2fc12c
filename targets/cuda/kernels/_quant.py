"""How an activation is quantized: its codes are

    int8:     clip(round_half_even(x / scale) + zero, low, high)
    float8:   clip(x / scale, −448, 448), to the nearest float8e4m3fn, ties to even

Scale and zero are tensors beside the data, read when the kernel runs: one captured graph serves all bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0


@dataclass(frozen=True)
class Quant:
    """scale, zero: float32, one element each, zero integral. low, high: its levels as codes; float8 has none."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    low: int = -128
    high: int = 127
    dtype: torch.dtype = torch.int8

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Codes of x in plain torch."""
        scaled = x.float() / self.scale
        if self.dtype == FLOAT8:
            return scaled.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
        rounded = scaled.round()
        if self.zero is not None:
            rounded = rounded + self.zero
        return rounded.clamp(self.low, self.high).to(self.dtype)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What the codes stand for, float32."""
        shifted = codes.float() if self.zero is None else codes.float() - self.zero
        return shifted * self.scale
