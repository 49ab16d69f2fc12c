"""A linear's weight as the kernels read it: K-major, which Hopper's 8-bit matrix instructions require.

    int8, fp8   data[N, K'], K' = K up to a multiple of 16 (rows of whole 16 bytes, for the copy engine), zeros behind K
    int4        what _pack4.pack makes of codes[N, K]

Scales are one a channel, [N], or one a channel and group of `group` consecutive inputs, [⌈K / group⌉, N]. The sums of
codes that the zero point z of an activation multiplies are made here, once:

    one scale a channel    colsum[n] = Σ_k codes[k, n], int32        y = (Σ_k c·w − z·colsum)·scale, exact but for scale
    groups                 colsum[n] = Σ_k values[k, n], float32     y = Σ_g scale[g]·(Σ_k∈g c·w) − z·colsum
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from vdq_export.targets.cuda.kernels._pack4 import pack, unpack
from vdq_export.targets.cuda.kernels._quant import FLOAT8

Kind = Literal["int8", "int4", "fp8"]
ALIGNMENT = 16


@dataclass(frozen=True)
class Weight:
    """W[k, n] = codes[k, n] · scale[n], or · scale[k // group, n]. group: 0 where scales are one a channel."""

    kind: Kind
    data: torch.Tensor
    scale: torch.Tensor
    colsum: torch.Tensor | None
    group: int
    k: int
    n: int

    @staticmethod
    def prepare(codes: torch.Tensor, scale: torch.Tensor, group: int, kind: Kind, device: torch.device | str) -> Weight:
        """codes[K, N]: int8 (levels of int4 too) or float8; scale: one element, [N], [1, N] or [⌈K / group⌉, N]."""
        k, n = codes.shape
        across = codes.to(device).t().contiguous()
        if group >= k:  # one group holds all
            group = 0
        scale = scale.to(device, torch.float32)
        scale = scale.reshape(-1, n).contiguous() if group else scale.reshape(-1).expand(n).contiguous()
        if group and len(scale) != -(-k // group):
            raise ValueError(f"{len(scale)} rows of scales for {k} inputs in groups of {group}")
        colsum = None if kind == "fp8" else _sums(across, scale, group)
        return Weight(kind=kind, data=_layout(across, kind), scale=scale, colsum=colsum, group=group, k=k, n=n)

    @property
    def nbytes(self) -> int:
        held = (self.data, self.scale) if self.colsum is None else (self.data, self.scale, self.colsum)
        return sum(one.numel() * one.element_size() for one in held)

    def codes(self) -> torch.Tensor:
        """codes[K, N] again, a view where the layout allows."""
        if self.kind == "int4":
            return unpack(self.data, self.k).t()
        return self.data[:, : self.k].t()

    def values(self) -> torch.Tensor:
        """W[K, N] in float32."""
        scale = self.scale.repeat_interleave(self.group, 0)[: self.k] if self.group else self.scale
        return self.codes().float() * scale


def _layout(across: torch.Tensor, kind: Kind) -> torch.Tensor:
    """codes[N, K] in the kernels' layout."""
    if kind == "int4":
        return pack(across)
    n, k = across.shape
    padded = torch.zeros(n, -(-k // ALIGNMENT) * ALIGNMENT, dtype=torch.int8, device=across.device)
    padded[:, :k] = across.view(torch.int8)
    return padded.view(FLOAT8) if kind == "fp8" else padded


def _sums(across: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """Sums of codes[N, K] over K, int32[N]; with groups of the values, float32[N], summed in float64."""
    n, k = across.shape
    if not group:
        return across.sum(1, dtype=torch.int32)
    padded = F.pad(across, (0, -k % group))
    sums = padded.reshape(n, -1, group).sum(2, dtype=torch.int32)
    return (sums.double() * scale.t().double()).sum(1).float()
