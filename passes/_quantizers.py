"""Q/DQ pairs, as the passes that place them write them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Value
from vdq_export.weights.number_grid import numpy_type

_INT32 = 2**31 - 1


class Quantizer(NamedTuple):
    """A per-tensor quantizer: q = clip(round(x / scale) + zero_point) in `dtype`. scale: one a place along `axis`, if
    there is an axis."""

    scale: float | Array
    zero_point: int
    dtype: str
    axis: int | None = None


def round_trip(graph: Graph, value: Value, quantizer: Quantizer, base: str) -> Value:
    """DequantizeLinear(QuantizeLinear(value)); `base` begins the names of what is new."""
    integer, shape = numpy_type(quantizer.dtype), list(value.shape)
    scale = np.array(quantizer.scale, np.float32)
    parameters = [
        graph.constant(graph.fresh(f"{base}.scale"), scale),
        graph.constant(graph.fresh(f"{base}.zero_point"), np.full(scale.shape, quantizer.zero_point, integer)),
    ]
    attrs = {} if quantizer.axis is None else {"axis": quantizer.axis}
    names = graph.fresh(f"{base}/Quantize"), graph.fresh(f"{base}/Dequantize")
    q = graph.add_node("QuantizeLinear", [value, *parameters], names[0], dtype=integer, shape=shape, attrs=attrs)
    return graph.add_node("DequantizeLinear", [q, *parameters], names[1], dtype=np.float32, shape=shape, attrs=attrs)


def to_int32(values: Array, grid: Array, where: str) -> Array:
    """round(values / grid); raises PlanError when that does not fit 32 bits."""
    q = np.rint(values.astype(np.float64) / grid)
    if np.abs(q).max(initial=0.0) > _INT32:
        raise PlanError(f"{where}: its bias does not fit 32 bits", hint="its input range is far too small for it")
    return q.astype(np.int32)
