"""One graph for all bins of one structure: what differs between them lies in a table, of which the device picks a row.

    every bin: q = Quantize(x, scale, zero)      ->      row = Row(bins[B, P], bin);  q = Quantize(x, Pick(row), …)

Exact: float32 holds all scales and zero points. uint8 zero points stand in the table less 128, as the kernels' int8
codes want them (ops.py); Cast(Pick + 128) gives readers of the standard operators what they had. Parameters of the
quantizers of activations are picked even where all bins agree, so that kernels take them from one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from vdq_export.errors import PassError
from vdq_export.graph import Array, Constant, Graph, Node, Value, is_constant
from vdq_export.targets.cuda.ops import BIN, BINS, DOMAIN, SHIFT, line

_EXACT = 1 << 24  # integers up to here are float32 numbers


@dataclass(frozen=True)
class _Column:
    """One parameter of the table. rows: float32 [B, size], of each bin; shifted: less SHIFT."""

    constant: Constant
    rows: Array
    shifted: bool


def merge(graph: Graph, constants: Sequence[Mapping[str, Array]]) -> Graph:
    """`graph`, of one bin, as the graph of all; it is not edited.

    constants: of each bin, by name, those that differ. The new graph's last input, `bin` int64[1], says the row.
    Raises PassError for a constant that the table cannot hold.
    """
    made = graph.copy()
    columns = [_column(one, constants) for one in made.constants() if _is_parameter(one, constants)]
    if not columns:
        return made
    widths = [line(column.rows.shape[1]) for column in columns]
    table = np.zeros((len(constants), sum(widths)), np.float32)
    index = made.add_input(made.fresh(BIN), np.int64, [1])
    bins = made.constant(made.fresh(BINS), table)
    row = made.add_node(
        "Row", [bins, index], made.fresh("Row"), dtype=np.float32, shape=[table.shape[1]], domain=DOMAIN
    )
    offset = 0
    for column, width in zip(columns, widths, strict=True):
        table[:, offset : offset + column.rows.shape[1]] = column.rows
        made.replace_uses(column.constant, _picked(made, row, column, offset))
        offset += width
    made.cleanup()
    return made


def _picked(graph: Graph, row: Value, column: _Column, offset: int) -> Value:
    """The parameter read from the row, in the constant's own type."""
    name, shape = column.constant.name, list(column.constant.shape)
    attrs = {"offset": offset, "shape": [int(size) for size in shape]}
    if not shape:
        del attrs["shape"]  # an empty list has no type in ONNX; absent is a scalar
    value = graph.add_node(
        "Pick", [row], graph.fresh(f"{name}.picked"), dtype=np.float32, shape=shape, attrs=attrs, domain=DOMAIN
    )
    dtype = np.dtype(column.constant.dtype)
    if dtype == np.float32:
        return value
    if column.shifted:
        shift = graph.constant(graph.fresh(f"{name}.shift"), np.array(SHIFT, np.float32))
        value = graph.add_node("Add", [value, shift], graph.fresh(f"{name}.shifted"), dtype=np.float32, shape=shape)
    to = {"to": int(helper.np_dtype_to_tensor_dtype(dtype))}
    return graph.add_node("Cast", [value], graph.fresh(f"{name}.cast"), dtype=dtype, shape=shape, attrs=to)


def _is_parameter(constant: Constant, constants: Sequence[Mapping[str, Array]]) -> bool:
    return any(constant.name in one for one in constants) or any(
        _quantizes(node) and any(value is constant for value in node.inputs[1:])
        for node in constant.outputs
        if constant.dtype in (np.float32, np.uint8, np.int8)
    )


def _quantizes(node: Node) -> bool:
    """A quantizer of a computed value, or what takes its codes back."""
    return node.op in ("QuantizeLinear", "DequantizeLinear") and not is_constant(node.inputs[0])


def _column(constant: Constant, constants: Sequence[Mapping[str, Array]]) -> _Column:
    every = [np.asarray(one.get(constant.name, constant.values)) for one in constants]
    shifted = np.dtype(constant.dtype) == np.uint8
    rows = np.stack([one.reshape(-1).astype(np.float32) for one in every])
    if any(np.abs(one.astype(np.float64)).max(initial=0) > _EXACT for one in every if one.dtype.kind in "iu"):
        raise PassError(f"{constant.name} differs between bins and does not fit the table of float32 numbers")
    return _Column(constant, rows - SHIFT if shifted else rows, shifted)
