"""Two 4-bit levels a byte, laid out so that a kernel unpacks them with one or two instructions for four weights.

    packed[n, c] = (w[n, c] & 15) | (w[n, H + c] << 4)        c < H, H = ⌈K / 2⌉ up to a multiple of 128, zeros behind K

The halves of a byte are two inputs that lie H apart, not neighbours: either half of a tile of bytes is then a tile of
weights over consecutive inputs, K-major as it lies, and meets a plain tile of the activations. A kernel masks
(`packed & 0xF0`: 16 · w[H + c]) or shifts and masks (`packed << 4`: 16 · w[c]) whole registers of four bytes. It never
extends a sign nor moves a byte, and takes the factor 16 back from the sums. H holds a multiple of every tile's inputs,
and of every group's (32, 64 or 128), so no tile straddles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ALIGNMENT = 128
LOWEST, HIGHEST = -8, 7


def half(k: int) -> int:
    """H: bytes in a packed row of k weights."""
    return -(-k // (2 * ALIGNMENT)) * ALIGNMENT


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8[N, H] of the levels codes[N, K], int8 within [−8, 7]."""
    k = codes.shape[1]
    if codes.numel() and not codes.is_meta and not (int(codes.min()) >= LOWEST and int(codes.max()) <= HIGHEST):
        raise ValueError(f"levels from {int(codes.min())} to {int(codes.max())} do not fit 4 bits")
    padded = F.pad(codes, (0, 2 * half(k) - k)).view(torch.uint8)
    return (padded[:, : half(k)] & 15) | (padded[:, half(k) :] << 4)


def unpack(packed: torch.Tensor, k: int) -> torch.Tensor:
    """codes[N, K] of what `pack` made, int8."""
    signed = packed.view(torch.int8)
    return torch.cat([signed << 4, signed], 1)[:, :k] >> 4
