"""Nearest rounding of weights to the grid of a WeightPlan; what solvers choose and passes store.

Legend: K input channels, N output channels, G groups of K / G input channels each (one group: a scale a channel).

Grid "int": q = clip(round(w / scale), -qmax, qmax). Grid "e2m1": q is twice a number of {0, ½, 1, 1½, 2, 3, 4, 6} or of
its negatives (the element type of MXFP4, OCP Microscaling Formats 1.0), so that it fits an integer and ŵ = scale · q.
Grid "e4m3": q is a float8e4m3fn number. Ties go to the even integer, in the floating-point grids to the even mantissa.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.graph import Array, release
from vdq_export.plan import Grid

E2M1_QMAX = 12  # twice the largest element, 6
_TILE = 64  # rows and columns transposed at a time
_CHUNK = 1 << 19  # weights converted at a time: the intermediate floats stay in cache


def nearest(quotient: Array, qmax: int, grid: Grid = "int") -> Array:
    """The level next to each w / scale, as floats; works in place and returns `quotient`."""
    if grid == "e2m1":
        # Twice the elements: steps of 1 up to 4, of 2 up to 8, of 4 up to 12; even multiples have even mantissas.
        size = np.abs(quotient)
        step = np.where(size < 4, 1, np.where(size < 8, 2, 4)).astype(quotient.dtype)
        quotient /= step
        np.rint(quotient, out=quotient)
        quotient *= step
    elif grid == "e4m3":
        np.clip(quotient, -qmax, qmax, out=quotient)  # first: what is too large becomes NaN in this type
        quotient[...] = quotient.astype(numpy_type("float8e4m3fn"))
    else:
        np.rint(quotient, out=quotient)
    return np.clip(quotient, -qmax, qmax, out=quotient)


def numpy_type(dtype: str) -> np.dtype[np.generic]:
    """numpy's type of an ONNX type; ml_dtypes' where numpy has none (4 bits, float8)."""
    found: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, dtype.upper()))
    return found


def quantize(weight: Array, scale: Array, qmax: int, grid: Grid = "int", dtype: str = "int8") -> Array:
    """q [K, N] of weight [K, N] in `dtype`, scale [N] or [G, N]; read in chunks, along its memory."""
    q = np.empty(weight.shape, numpy_type(dtype))
    rows = scale if scale.ndim == 2 else scale[None]
    group = len(weight) // len(rows)
    by_column = weight.flags.f_contiguous and not weight.flags.c_contiguous
    if by_column:
        step = max(_TILE, _CHUNK // max(1, len(weight)) // _TILE * _TILE)
        for start in range(0, weight.shape[1], step):
            part = slice(start, start + step)
            # Transposed: rows of memory then are output channels, each with its groups one behind the other.
            chunk = weight[:, part].T / _spread(rows[:, part].T, group, axis=1)
            codes = nearest(chunk, qmax, grid).astype(q.dtype)
            for row in range(0, len(weight), _TILE):  # a transpose of whole columns would miss the cache at every byte
                q[row : row + _TILE, part] = codes[:, row : row + _TILE].T
    else:
        unit = group if len(rows) > 1 else 1
        step = unit * max(1, _CHUNK // max(1, weight.shape[1] * unit))
        for start in range(0, len(weight), step):
            part = slice(start, start + step)
            own = rows if len(rows) == 1 else _spread(rows[start // group : (start + step) // group], group, axis=0)
            q[part] = nearest(weight[part] / own, qmax, grid).astype(q.dtype)
    release(weight)
    return q


def dequantize(codes: Array, scale: Array) -> Array:
    """ŵ [K, N] float32 of codes [K, N] and scale [N] or [G, N]: scale · q, rounded once."""
    rows = scale if scale.ndim == 2 else scale[None]
    found: Array = codes.astype(np.float32)
    found *= _spread(rows.astype(np.float32), len(codes) // len(rows), axis=0)
    return found


def _spread(scale: Array, group: int, axis: int) -> Array:
    """Each group's scale at each of its channels; one group of all is left to broadcasting."""
    return scale if scale.shape[axis] == 1 else np.repeat(scale, group, axis=axis)
