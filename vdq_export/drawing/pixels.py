"""Clips as bytes that can be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


def pixels(clip: NDArray[Any]) -> Pixels:
    """[C, F, H, W] in [0, 1] → bytes [F, H, W, 3]: 3 channels in colour, any other number in grey, side by side."""
    if clip.shape[0] != 3:
        clip = np.concatenate(list(clip), axis=-1)[None].repeat(3, 0)
    found: Pixels = (np.nan_to_num(clip).clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 3, 0)
    return found
