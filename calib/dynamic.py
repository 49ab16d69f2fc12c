"""What quantizers do to rows of activations: static ranges, and the kinds whose scales are computed at run time.

Legend: n token rows, K input channels. Ratio ρ and exponent offset o are those of plan.Dynamic.

- token: asymmetric grid over [ρ·min(x, 0), ρ·max(x, 0)] of each row.
- channel: the same of each channel, over the rows of one sample.
- mx: blocks of 32 channels of a row share the scale 2^e, e = ⌊log2(ρ·max|x|)⌋ − 2 + o within −125 … 127, and round to
  the E2M1 numbers 0, ½, 1, 1½, 2, 3, 4, 6 (OCP Microscaling Formats 1.0). 4 … 6 · 2^e are covered, so with o = 0 and
  ρ = 1 (the standard's floor) a largest value between 6 and 8 · 2^e saturates.
- mxfp8: the same blocks, E4M3 numbers, e = ⌈log2(max|x| / 448)⌉: nothing saturates.
- nvfp4: blocks of 16 channels share the scale s · unit, s the E4M3 number next to max|x| / (6 · unit), at most 448, and
  round to E2M1 numbers. unit is static: a bin's largest |x| gets s = 448.
"""

from __future__ import annotations

import numpy as np

from vdq_export.calib.ranges import Grid, fake_quantize
from vdq_export.graph import Array
from vdq_export.plan import E4M3_MAX, MX_BLOCK, NVFP4_BLOCK, Dynamic, Range
from vdq_export.recipe import ActivationRecipe
from vdq_export.weights import number_grid

NVFP4_PEAK = 6 * E4M3_MAX  # the largest number of a tensor with unit 1
_MX_EXPONENT = 2  # of the largest power of two among the E2M1 numbers
_E8M0 = (-125, 127)  # it has -126 and -127 too, whose half is no normal float32
_TINY = np.float32(np.finfo(np.float32).tiny)


def online(settings: ActivationRecipe, known: Range | None) -> Dynamic | None:
    """The quantizer of recipes that compute scales at run time; None for the others.

    known: the value's range in a bin; only nvfp4 needs one.
    """
    if settings.grid == "mxfp4":
        return Dynamic(kind="mx", why="E8M0 scales of blocks of 32 are part of the number format")
    if settings.grid == "mxfp8":
        return Dynamic(kind="mxfp8", why="E8M0 scales of blocks of 32 are part of the number format")
    if settings.grid == "nvfp4" and known is not None:
        unit = two_level_unit(max(-known.lo, known.hi))
        return Dynamic(kind="nvfp4", why=f"E4M3 scales of blocks of 16, unit from {known.why}", unit=unit)
    if settings.granularity != "tensor":
        return Dynamic(kind=settings.granularity, why=f"scales per {settings.granularity}, as the recipe says")
    return None


def two_level_unit(peak: float) -> float:
    """What E4M3 block scales of E2M1 numbers are multiplied with so that `peak` is the largest number; 1 for peak 0.

    It has 20 significant bits, so that its product with an E4M3 number (4 bits) is a float32 exactly.
    """
    mantissa, exponent = np.frexp(peak / NVFP4_PEAK)
    unit = float(np.ldexp(np.ceil(np.ldexp(mantissa, 20)), exponent - 20))
    return unit if unit >= _TINY else 1.0


def quantize_rows(rows: Array, how: Range | Dynamic, grid: Grid) -> Array:
    """x̂ of float32 rows [n, K]; for kind `channel`, rows of one sample. Raises ValueError for blocks and odd widths."""
    if isinstance(how, Range):
        return fake_quantize(rows, how.scale, how.zero_point, grid)
    if how.kind in ("mx", "mxfp8"):
        return _mx(rows, how)
    if how.kind == "nvfp4":
        return _nvfp4(rows, how)
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
    blocks = _blocks(rows, MX_BLOCK)
    largest = np.abs(blocks).max(axis=2, keepdims=True) * np.float32(how.ratio)
    if how.kind == "mxfp8":
        mantissa, exponent = np.frexp(largest / np.float32(E4M3_MAX))  # = m · 2^exponent, ½ <= m < 1
        unit = np.ldexp(np.float32(1), np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), *_E8M0))
        return np.asarray(number_grid.nearest(blocks / unit, E4M3_MAX, "e4m3") * unit).reshape(rows.shape)
    _, exponent = np.frexp(largest)  # the floor of log2 is exponent − 1
    exponent = np.clip(exponent - 1 - _MX_EXPONENT + how.offset, *_E8M0)
    half = np.ldexp(np.float32(0.5), exponent)  # number_grid counts in halves
    found: Array = number_grid.nearest(blocks / half, number_grid.E2M1_QMAX, "e2m1") * half
    return found.reshape(rows.shape)


def _nvfp4(rows: Array, how: Dynamic) -> Array:
    blocks, unit = _blocks(rows, NVFP4_BLOCK), np.float32(how.unit)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / (np.float32(6) * unit)
    scale = number_grid.nearest(scale, E4M3_MAX, "e4m3") * unit
    half = np.where(scale > 0, scale, np.float32(np.inf)) / 2  # number_grid counts in halves; blocks without a scale: 0
    found = number_grid.nearest(blocks / half, number_grid.E2M1_QMAX, "e2m1") * (scale / 2)
    return np.asarray(found).reshape(rows.shape)


def _blocks(rows: Array, size: int) -> Array:
    if rows.shape[1] % size:
        raise ValueError(f"{rows.shape[1]} channels in blocks of {size}")
    return rows.reshape(len(rows), -1, size)
