"""Quantizers in front of what only moves numbers.

    Normalize(Reshape, Transpose, Squeeze or Unsqueeze(x)) that only quantizes   ->  the same move of Normalize(x)
    Normalize(Concat(x, y, …)) that only quantizes                               ->  Concat of Normalize(x), of y, …

Exact: one scale for all numbers, wherever they lie. Codes are a fourth of a float32, and a kernel in front gives them
itself. Only where nobody else reads what was moved.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node
from vdq_export.graphs.match import made_by, readers
from vdq_export.targets.cuda._fused import add, fused_by, held, is_output, operand, remove, result
from vdq_export.targets.cuda._steps import only_quantizes, take_quantizer

NAME = "quantize_early"
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    waiting = [node for node in graph.nodes if only_quantizes(node)]
    while waiting:
        node = waiting.pop()
        value = node.inputs[0]
        move, kernel = made_by(value, *_MOVES), fused_by(value, "Linear", "Attention", "Normalize")
        if kernel is not None and take_quantizer(graph, kernel):
            report.did(kernel.name)
        elif move is not None and not move.domain and len(readers(value)) == 1 and not is_output(graph, value):
            waiting += _swap(graph, node, move)
            report.did(move.name)
    graph.cleanup()
    return report


def _swap(graph: Graph, node: Node, move: Node) -> list[Node]:
    """Let `move` move codes; returns the quantizers in front of it."""
    codes, made = held(node, "q"), list[Node]()
    names = ("out_scale", "out_zero")
    parts = list(move.inputs) if move.op == "Concat" else [move.inputs[0]]
    parameters, attrs, name = {one: operand(node, one) for one in names}, dict(node.attrs), node.name
    remove(node)
    for index, part in enumerate(parts):
        quantized = {"q": (codes.dtype, part.shape)}
        one = add(graph, "Normalize", graph.fresh(name), {"x": part, **parameters}, quantized, attrs)
        move.inputs[index] = result(one, "q")
        made.append(one)
    move.outputs.clear()
    move.outputs.append(codes)
    return made
