"""The table of the bins' numbers without those that no kernel reads any more.

    Row(bins[B, P], bin) with Picks of some of P   ->   Row(bins'[B, P'], bin), the Picks at new offsets

Exact: the same numbers. Clip bounds became levels, scales repeated for each channel of a head became one a head. The
device copies a row a step, and the bundle holds the table.
"""

from __future__ import annotations

from math import prod

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node
from vdq_export.graphs.match import readers
from vdq_export.targets.cuda._fused import is_fused
from vdq_export.targets.cuda.ops import line

NAME = "trim_table"


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if is_fused(node, "Row") and (freed := _trim(graph, node)):
            report.did(f"{node.name}: {freed} of the numbers of a bin")
    return report


def _trim(graph: Graph, node: Node) -> int:
    """Numbers of a bin that went."""
    table, row = node.inputs[0], node.outputs[0]
    picks = sorted(readers(row), key=lambda pick: (pick.attrs["offset"], pick.name))
    sizes = [prod(pick.attrs.get("shape", ())) for pick in picks]
    width = sum(line(size) for size in sizes)
    if width >= table.values.shape[1]:
        return 0
    values, offset = np.zeros((len(table.values), width), np.float32), 0
    for pick, size in zip(picks, sizes, strict=True):
        begin = pick.attrs["offset"]
        values[:, offset : offset + size] = table.values[:, begin : begin + size]
        pick.attrs["offset"] = offset
        offset += line(size)
    freed: int = table.values.shape[1] - width
    table.values, row.shape = values, [width]
    return freed
