"""What quantizers do to rows of activations: static ranges, and the three kinds whose scales are computed at run time.

Legend: n token rows, K input channels. Ratio ρ and exponent offset o are those of plan.Dynamic.

- token: asymmetric grid over [ρ·min(x, 0), ρ·max(x, 0)] of each row.
- channel: the same of each channel, over the rows of one sample.
- mx: blocks of 32 channels of a row share the scale 2^e, e = ⌊log2(ρ·max|x|)⌋ − 2 + o within −125 … 127, and round to
  the E2M1 numbers 0, ½, 1, 1½, 2, 3, 4, 6 (OCP Microscaling Formats 1.0). 4 … 6 · 2^e are covered, so with o = 0 and
  ρ = 1 (the standard's floor) a largest value between 6 and 8 · 2^e saturates.
"""

from __future__ import annotations

import numpy as np

from vdq_export import number_grid
from vdq_export.calib.ranges import Grid, fake_quantize
from vdq_export.graph import Array
from vdq_export.plan import Dynamic, Range

MX_BLOCK = 32  # channels a scale in MXFP4 (OCP Microscaling Formats 1.0)
_MX_EXPONENT = 2  # of the largest power of two among the E2M1 numbers
_E8M0 = (-125, 127)  # it has -126 and -127 too, whose half is no normal float32
_TINY = np.float32(np.finfo(np.float32).tiny)


def quantize_rows(rows: Array, how: Range | Dynamic, grid: Grid) -> Array:
    """x̂ of float32 rows [n, K]; for kind `channel`, rows of one sample. Raises ValueError for "mx" and odd widths."""
    if isinstance(how, Range):
        return fake_quantize(rows, how.scale, how.zero_point, grid)
    if how.kind == "mx":
        return _mx(rows, how)
    return _affine_over(rows, 1 if how.kind == "token" else 0, how.ratio, grid)


def _affine_over(rows: Array, axis: int, ratio: float, grid: Grid) -> Array:
    """As ranges.affine and ranges.fake_quantize, with a scale and a zero point for each slice along `axis`."""
    low = np.minimum(rows.min(axis=axis, keepdims=True), 0) * np.float32(ratio)
    high = np.maximum(rows.max(axis=axis, keepdims=True), 0) * np.float32(ratio)
    scale = (high - low) / np.float32(grid.levels)
    scale[scale < _TINY] = 1
    zero = np.clip(np.rint(-low / scale), 0, grid.levels)
    quotient = np.rint(rows / scale)
    np.clip(quotient, -zero, grid.levels - zero, out=quotient)
    quotient *= scale
    return np.asarray(quotient)


def _mx(rows: Array, how: Dynamic) -> Array:
    if rows.shape[1] % MX_BLOCK:
        raise ValueError(f"{rows.shape[1]} channels in blocks of {MX_BLOCK}")
    blocks = rows.reshape(len(rows), -1, MX_BLOCK)
    largest = np.abs(blocks).max(axis=2, keepdims=True) * np.float32(how.ratio)
    _, exponent = np.frexp(largest)  # largest = m · 2^exponent, ½ <= m < 1: the floor of log2 is exponent − 1
    exponent = np.clip(exponent - 1 - _MX_EXPONENT + how.offset, *_E8M0)
    half = np.ldexp(np.float32(0.5), exponent)  # number_grid counts in halves
    found: Array = number_grid.nearest(blocks / half, number_grid.E2M1_QMAX, "e2m1") * half
    return found.reshape(rows.shape)
