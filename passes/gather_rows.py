"""Rows taken by constant indices, without GatherND.

Legend: x[S, …], n constant row numbers, all in 0 … S-1.

    GatherND(x, [[i], [i+1], … [j-1]])      ->  Slice(x, i, j, axis 0)
    GatherND(x, rows[n, 1])                 ->  Gather(x, rows[n], axis 0)

Exact: the same rows in the same order. Hexagon's compiler takes GatherND and gives other rows (the emulator is -2 dB
off); Gather and Slice it gets right.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph
from vdq_export.graphs.match import integers

NAME = "gather_rows"
AFTER = ("fold_constants",)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op != "GatherND":
            continue
        indices = node.inputs[1]
        rows = integers(indices)
        if not rows or list(indices.shape) != [len(rows), 1] or node.attrs.get("batch_dims", 0) or min(rows) < 0:
            report.skip(node.name, "its indices are no constant row numbers")
            continue
        node.attrs = {}
        if rows == list(range(rows[0], rows[0] + len(rows))):
            node.op = "Slice"
            ends = (rows[0], rows[-1] + 1, 0)
        else:
            node.op, node.attrs["axis"] = "Gather", 0
            ends = None
        operands = [np.array(rows, np.int64)] if ends is None else [np.array([end], np.int64) for end in ends]
        constants = [graph.constant(graph.fresh(f"{node.name}.{i + 1}"), array) for i, array in enumerate(operands)]
        source = node.inputs[0]
        node.inputs.clear()
        node.inputs.extend([source, *constants])
        report.did(f"{node.name}: {node.op}")
    graph.cleanup()
    return report
