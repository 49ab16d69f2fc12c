"""Weight scales: symmetric, one an output channel or one a group of input channels of it; float, E8M0 or E4M3.

Legend: K input channels, N output channels, G = K / group; a *cell* is what shares one scale: C cells of L weights.

- minmax: the largest magnitude of the cell is the largest level.
- mse: that bound narrowed to the least ‖w − ŵ‖² of the cell, thirteen candidates down to 0.4.
- pbq (Progressive Bounded Quantization of DVD-Quant, later Bounded-init Grid Refinement): starts at [min, max] of an
  output channel, narrows both bounds independently and keeps the pair of least ‖w − ŵ‖². Our grids are symmetric,
  because weights with a zero point a channel are what SoC compilers refuse; there a pair (lo, hi) has the step
  max(−lo, hi) / qmax whatever its smaller side is, and clipping that side alone could only add error: the pairs are one
  bound. It is searched from the full one down to a tenth, then three times around the best. What the zero point would
  be worth: at 4 bits its 16 levels have 9 % (digits) or 20 % (digits-hard) less error than our 15 symmetric ones.
- e8m0: scales are powers of two. minmax takes the smallest that covers the cell (the exponent's ceiling: its floor,
  the standard's choice, saturates above its largest number); the others take the least error of floor − 1 … floor + 1.
- e4m3: what the method says, rounded to an E4M3 number times the weight's unit (NVFP4's two levels).

Weights are read in chunks of CHUNK_BYTES, and a chunk is searched in pieces that stay in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from vdq_export.calib.dynamic import two_level_unit
from vdq_export.calib.formats import WeightFormat
from vdq_export.graph import Array, release
from vdq_export.plan import E4M3_MAX
from vdq_export.weights import number_grid

Method = Literal["minmax", "mse", "pbq"]
CHUNK_BYTES = 16 * 2**20
_PIECE = 1 << 16  # weights searched at a time
_TINY = float(np.finfo(np.float32).tiny)
# Exponents of the levels' unit. E2M1 codes are twice the numbers: of E8M0's exponents, -126 and -127 halved would be no
# normal float32. E4M3 stops at -126 for the same reason.
_E8M0 = {"e2m1": (-126, 126), "e4m3": (-126, 127)}
_COARSE = {"mse": np.linspace(1.0, 0.4, 7), "pbq": np.geomspace(1.0, 0.1, 19)}
# Around the best coarse ratio: all at once, or one finer pair after the other.
_FINE = {"mse": ((-0.075, -0.05, -0.025, 0.025, 0.05, 0.075),), "pbq": ((-0.06, 0.06), (-0.03, 0.03), (-0.015, 0.015))}


def scales(weight: Array, fmt: WeightFormat, method: Method = "minmax") -> Array:
    """float32 [N], or [K / group, N]. A cell of zeros gets scale 1 (e8m0: another power of two; e4m3: the least one).

    Raises ValueError when the groups do not divide K.
    """
    k, n = weight.shape
    fmt = fitted(weight, fmt)
    group = fmt.group or k
    if group and k % group:
        raise ValueError(f"{k} channels in groups of {group}")
    found = np.ones((k // group if group else 1, n), np.float32)
    for where, cells in _chunks(weight, group) if group else ():
        step = max(1, _PIECE // group)
        parts = [_cell_scales(cells[i : i + step], fmt, method) for i in range(0, len(cells), step)]
        found[where] = np.concatenate(parts).reshape(found[where].shape)
    release(weight)
    return found if fmt.group else _within_span(found[0], weight, fmt.span)


def _within_span(scale: Array, weight: Array, span: float) -> Array:
    """No scale below the largest / span: a channel that small hardly matters beside it. Channels of zeros take that."""
    if not span:
        return scale
    used = np.asarray(weight).any(axis=0)
    largest = scale[used].max(initial=0.0) or np.float32(1)
    bounded: Array = np.where(used, np.maximum(scale, largest / np.float32(span)), largest).astype(np.float32)
    return bounded


def fitted(weight: Array, fmt: WeightFormat) -> WeightFormat:
    """`fmt` with its unit where scales have two levels: half of what makes the largest weight 6 · 448."""
    if fmt.scales != "e4m3" or fmt.unit:
        return fmt
    return fmt._replace(unit=two_level_unit(float(row_peaks(weight).max(initial=0.0))) / 2)


def quantize(weight: Array, scale: Array, fmt: WeightFormat) -> Array:
    """Nearest codes [K, N], int8 (int16 for more than 8 bits)."""
    return number_grid.quantize(weight, scale, fmt.qmax, fmt.grid, code_type(fmt))


def dequantize(codes: Array, scale: Array, fmt: WeightFormat) -> Array:
    """ŵ [K, N] float32."""
    return number_grid.dequantize(codes, scale)


def round_rows(weight: Array, scale: Array, fmt: WeightFormat) -> Array:
    """Codes [R, N] of R input channels that share scale [N]."""
    return number_grid.nearest(weight / scale, fmt.qmax, fmt.grid).astype(number_grid.numpy_type(code_type(fmt)))


def error_std_reduction(weight: Array, fmt: WeightFormat, method: Method = "pbq") -> float:
    """1 − σ(W − Ŵ) with `method` / σ(W − Ŵ) with minmax, over the whole weight; 0 where minmax is exact."""
    plain, ours = (_error_std(weight, fmt, m) for m in ("minmax", method))
    return 1.0 - ours / plain if plain > 0 else 0.0


def row_peaks(weight: Array) -> Array:
    """Largest |weight[k, n]| of each input channel, [K] float32."""
    highest = np.zeros(weight.shape[0], np.float32)
    for rows, columns in _tiles(weight):
        chunk = np.asarray(weight[rows, columns], np.float32)
        highest[rows] = np.maximum(highest[rows], np.maximum(chunk.max(axis=1), -chunk.min(axis=1)))
    return highest


def code_type(fmt: WeightFormat) -> str:
    """ONNX type of the codes in the plan's tensors."""
    if fmt.grid == "e4m3":
        return fmt.dtype
    return "int8" if fmt.qmax <= 127 else "int16"


def _error_std(weight: Array, fmt: WeightFormat, method: Method) -> float:
    scale = scales(weight, fmt, method)
    error = number_grid.dequantize(quantize(weight, scale, fmt), scale)
    error -= weight
    return float(error.std(dtype=np.float64))


# -- one chunk of cells ----------------------------------------------------------------------------------------------


def _cell_scales(cells: Array, fmt: WeightFormat, method: Method) -> Array:
    """Scale of each cell, [C] float32, of cells [C, L]."""
    highest = np.maximum(cells.max(axis=1), -cells.min(axis=1))
    if fmt.scales == "e8m0":
        return _power_scales(cells, highest, fmt, method)
    if method != "minmax":
        highest = highest * _best_ratio(cells, highest, fmt, method)
    scale = highest / np.float32(fmt.qmax)
    if fmt.scales == "e4m3":
        levels = number_grid.nearest(scale / np.float32(fmt.unit), E4M3_MAX, "e4m3")
        return np.asarray(np.maximum(levels, np.float32(2.0**-9)) * np.float32(fmt.unit))
    return np.where(scale < _TINY, np.float32(1.0), scale).astype(np.float32)


def _best_ratio(cells: Array, highest: Array, fmt: WeightFormat, method: Method) -> Array:
    """Share of `highest` [C] with the least squared error of its cell, [C] float32."""
    unit = cells / np.where(highest < _TINY, 1, highest)[:, None].astype(np.float32)
    scaled, rounded = np.empty_like(unit), np.empty_like(unit)
    best, least = np.ones(len(cells), np.float32), np.full(len(cells), np.inf, np.float32)

    def attempt(ratio: Array) -> None:
        levels = np.float32(fmt.qmax) / ratio  # steps of this candidate from 0 to the cell's peak
        np.multiply(unit, levels[:, None], out=scaled)
        np.copyto(rounded, scaled)
        error = number_grid.nearest(rounded, fmt.qmax, fmt.grid)
        error -= scaled
        squared = np.einsum("cl,cl->c", error, error) / (levels * levels)
        better = squared < least
        best[better], least[better] = ratio[better], squared[better]

    for coarse in _COARSE[method]:
        attempt(np.full_like(best, coarse))
    for offsets in _FINE[method]:
        centre = best.copy()
        for offset in offsets:
            moved = centre + offset if method == "mse" else centre * (1 + offset)
            attempt(np.minimum(moved, 1).astype(np.float32))
    return best


def _power_scales(cells: Array, highest: Array, fmt: WeightFormat, method: Method) -> Array:
    """2^e, [C] float32, of codes up to qmax."""
    most = int(np.frexp(fmt.qmax)[1])  # 4 for 12, 9 for 448: floor(log2) + 1
    live = np.where(highest > 0, highest, np.float32(2.0 ** (most - 2)))
    floor = np.frexp(live)[1] - most
    candidates = [np.clip(floor + offset, *_E8M0[fmt.grid]) for offset in (-1, 0, 1)]
    if method == "minmax":
        chosen = np.where(live > np.ldexp(np.float32(fmt.qmax), candidates[1]), candidates[2], candidates[1])
        return np.asarray(np.ldexp(np.float32(1), chosen))
    errors = []
    for exponent in candidates:
        # In units of the cell's own exponent, where squares neither overflow nor vanish.
        unit = np.ldexp(cells, -exponent[:, None])
        error = number_grid.nearest(unit.copy(), fmt.qmax, fmt.grid) - unit
        errors.append(np.ldexp(np.einsum("cl,cl->c", error, error), 2 * (exponent - candidates[1])))
    best = np.argmin(errors, axis=0)
    return np.asarray(np.ldexp(np.float32(1), np.choose(best, candidates)))


# -- reading ---------------------------------------------------------------------------------------------------------


def _chunks(weight: Array, group: int) -> Iterator[tuple[tuple[slice, slice], Array]]:
    """(where among the scales [K / group, N], its cells [C, group] float32, group-major) of about CHUNK_BYTES each."""
    grouped = weight.reshape(-1, group, weight.shape[1])
    by_column = len(grouped) == 1 or (weight.flags.f_contiguous and not weight.flags.c_contiguous)
    for part in _blocks(weight, weight.shape[1] if by_column else len(grouped)):
        where = (slice(None), part) if by_column else (part, slice(None))
        chunk = grouped[where[0], :, where[1]].transpose(0, 2, 1)
        yield where, np.ascontiguousarray(chunk, np.float32).reshape(-1, group)


def _blocks(weight: Array, size: int) -> Iterator[slice]:
    """`size` equal shares of the weight, in slices of about CHUNK_BYTES."""
    step = max(1, int(CHUNK_BYTES // max(1, weight.nbytes // max(1, size))))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _tiles(weight: Array) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) blocks that lie together in memory; weights are often transposed views of a module's own."""
    across = weight.flags.f_contiguous and not weight.flags.c_contiguous
    for part in _blocks(weight, weight.shape[1 if across else 0]):
        yield (slice(None), part) if across else (part, slice(None))
    release(weight)
