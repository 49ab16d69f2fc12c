"""Squares as products.

    Pow(x, 2)   ->   Mul(x, x)

Exact. An exponent is a float constant: an NPU that has integer Mul but no integer Pow leaves its integer domain for it.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph
from vdq_export.graphs.match import scalar

NAME = "square"
AFTER = ("rms_norm",)  # which knows a mean square by its Pow


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op == "Pow" and scalar(node.inputs[1]) == 2.0:
            node.op = "Mul"
            node.inputs[1] = node.inputs[0]
            report.did(node.name)
    graph.cleanup()
    return report
