"""The first factor of low-rank branches in the kernel of the norm in front of them.

Legend: M rows, C channels, r columns: the ranks of all linears that read v.

    [Reshape ->] Gemm(v[..., C], D[C, r]) beside Normalize(x) -> v, codes   ->   Normalize(x) -> v, codes, low[M, r]

Exact: the kernel multiplies the v that it has not quantized. Slices of low for one linear each stay: they are views.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.graphs.match import readers
from vdq_export.targets.cuda._fused import held, is_fused, is_output, operand, put, put_result, remove, result

NAME = "fuse_low_rank_down"
MOST_COLUMNS = 256  # more are a matrix product of their own


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        y = result(node, "y") if is_fused(node, "Normalize") and operand(node, "down") is None else None
        found = [] if y is None else [gemm for reader in readers(y) if (gemm := _product(reader, y)) is not None]
        for gemm in found[:1]:
            if gemm.attrs or gemm.inputs[1].shape[1] > MOST_COLUMNS:
                report.skip(gemm.name, f"not a plain product of at most {MOST_COLUMNS} columns")
                continue
            _fuse(graph, node, gemm)
            report.did(node.name)
    graph.cleanup()
    return report


def _product(reader: Node, y: Value) -> Node | None:
    """The Gemm of y's rows and a constant that is `reader`, or reads it alone."""
    rows = y
    if reader.op == "Reshape" and list(reader.outputs[0].shape[1:]) == [y.shape[-1]]:
        rows, (reader, *_) = reader.outputs[0], [*readers(reader.outputs[0]), reader]
    plain = reader.op == "Gemm" and len(reader.inputs) == 2 and reader.inputs[0] is rows
    return reader if plain and is_constant(reader.inputs[1]) else None


def _fuse(graph: Graph, node: Node, gemm: Node) -> None:
    y, (rows, down), low = held(node, "y"), gemm.inputs, gemm.outputs[0]
    remove(gemm)
    if rows is not y and not readers(rows):
        remove(rows.inputs[0])
    put(node, down=down)
    if rows is not y:  # the kernel's has the leading axes of y
        target = graph.constant(graph.fresh(f"{low.name}/Rows.shape"), np.array(low.shape, np.int64))
        name = graph.fresh(f"{low.name}/Rows")
        flat = graph.add_node("Reshape", [low, target], name, dtype=low.dtype, shape=low.shape)
        graph.replace_uses(low, flat, keep=flat.inputs)
        low.shape = [*y.shape[:-1], down.shape[1]]
    put_result(node, "low", low)
    if not readers(y) and not is_output(graph, y):
        put_result(node, "y", None)
