"""Which of its two forms a kernel runs in: Triton on the device, or the plain torch that says what it computes."""

from __future__ import annotations

import os
from contextvars import ContextVar

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels of this process, on the CPU; read once, as Triton reads it."""

recording: ContextVar[bool] = ContextVar("kernels are only written down, none runs", default=False)


def forced() -> bool:
    """Kernels are launched wherever their tensors lie: in Triton's interpreter (slow, for tests), or to be recorded."""
    return recording.get() or (INTERPRETED and os.environ.get("VDQ_KERNELS") == "triton")


def runs_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or forced()


def blocks(size: int, block: int) -> int:
    """How many blocks cover it."""
    return -(-size // block)


def power_of_two(size: int, least: int = 1) -> int:
    """The least power of two that holds it: Triton's shapes are powers of two."""
    return max(least, int(triton.next_power_of_2(size)))
