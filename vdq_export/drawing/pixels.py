"""Clips as bytes that can be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def pixels(clip: NDArray[Any]) -> Pixels:
    """[C, F, H, W] in [0, 1] → bytes [F, H, W, 3]: 3 channels in colour, any other number in grey, side by side."""
    # Frame by frame: a whole clip in float takes four times the bytes, once more for each step of the formula.
    return np.stack([_frame(clip[:, number]) for number in range(clip.shape[1])])


def _frame(frame: NDArray[Any]) -> Pixels:
    """[C, H, W] → [H, W, 3]"""
    if frame.shape[0] != 3:
        frame = np.concatenate(list(frame), axis=-1)[None].repeat(3, 0)
    found: Pixels = (np.nan_to_num(frame).clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    return found
