"""What becomes of a value before its quantizer sees it, and of the weights that read it.

    x'[..., K] = ((x / s) · H) / c          W'[K, N] = c · Hᵀ · (s · W)          x' · W' = x · W, exactly

s: smoothing, H: block-diagonal orthonormal Hadamard matrix, c: channel scale after the rotation; each may be missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vdq_export.graph import Array
from vdq_export.hadamard import rotate, unrotate_rows
from vdq_export.plan import LayerPlan, Rotation, Smoothing


@dataclass(frozen=True)
class Transform:
    """smoothing and rotation of one value, as the plan states them; calling it applies them to rows [..., K]."""

    smoothing: Smoothing | None = None
    rotation: Rotation | None = None
    smoothing_why: str = ""
    rotation_why: str = ""

    @staticmethod
    def of(layer: LayerPlan) -> Transform:
        return Transform(layer.smoothing, layer.rotation, layer.smoothing_why, layer.rotation_why)

    @cached_property
    def scale(self) -> Array | None:
        """s [K] float32."""
        return None if self.smoothing is None else np.array(self.smoothing.scale, np.float32)

    @cached_property
    def after(self) -> Array | None:
        """c [K] float32."""
        has = self.rotation is not None and self.rotation.scale
        return np.array(self.rotation.scale, np.float32) if self.rotation and has else None

    def __call__(self, rows: Array) -> Array:
        x = rows if self.scale is None else rows / self.scale
        if self.rotation is not None:
            x = rotate(x, self.rotation.block)
        return x if self.after is None else x / self.after

    def weight(self, weight: Array) -> Array:
        """W' of W [K, N], float32."""
        w = np.asarray(weight, np.float32)
        w = w if self.scale is None else w * self.scale[:, None]
        if self.rotation is not None:
            w = unrotate_rows(w, self.rotation.block)
        return w if self.after is None else w * self.after[:, None]
