"""Masks of attention within a range that 16 bits resolve.

Legend: s scores, m a mask of zeros and ones (or of booleans), c a large negative constant: -10000, -3.4e38 or -inf.

    Softmax(s + (1 - m)·c)              ->  Softmax(s + (1 - m)·MASKED)         MASKED = -64
    Softmax(s + Where(m, 0, c))         ->  Softmax(s + Where(m, 0, MASKED))
    Where(IsNaN(p), 0, p)               ->  p                       p = Softmax(…): torch's guard against -inf

also where layout changes, Expand or Cast lie between the mask and the sum. A quantizer that has to reach c has steps of
0.15 (-10000) for the scores beside it, or none at all (-inf).

Exact to float32 as long as no masked score is 47 above the largest one that is not: exp(47 - 64) is 4e-8, and scores
are far smaller. A row that is masked altogether keeps its softmax, as all its scores move alike; where c was -inf it
was NaN (or 0, behind the guard). No float of rank and size of a score overflows a softmax otherwise: the guard goes.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import made_by, readers, scalar

NAME = "mask_bias"
AFTER = ("fold_constants", "no_ops")
MASKED = -64.0
LARGE = -1000.0  # what is below it is no score
_BETWEEN = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Tile", "Transpose", "Cast", "Slice", "Concat", "Identity")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    outputs = {id(value) for value in graph.gs.outputs}
    replacement: dict[np.dtype[np.generic], Value] = {}
    for node in graph.nodes:
        guarded = _guarded(node)
        if guarded is not None:
            graph.replace_uses(node.outputs[0], guarded)
            node.outputs.clear()
            report.did(f"{node.name}: guard against NaN removed")
        index = _masking_operand(node)
        if index is None:
            continue
        other = _not_added_to_scores(node.outputs[0], outputs)
        if other:
            report.skip(node.name, f"the mask is also read by {other}")
            continue
        old = node.inputs[index]
        dtype = np.dtype(old.dtype)
        if dtype not in replacement:
            replacement[dtype] = graph.constant(graph.fresh(f"{node.name}.masked"), np.array(MASKED, dtype))
        node.inputs[index] = replacement[dtype]
        report.did(f"{node.name}: {scalar(old):g} is {MASKED:g}")
    graph.cleanup()
    return report


def _guarded(node: Node) -> Value | None:
    """The softmax whose NaN `node` replaces by zero."""
    if node.op != "Where" or scalar(node.inputs[1]) != 0.0:
        return None
    question, value = made_by(node.inputs[0], "IsNaN"), node.inputs[2]
    return value if question is not None and question.inputs[0] is value and made_by(value, "Softmax") else None


def _masking_operand(node: Node) -> int | None:
    """Which operand of a Mul or Where is the constant that masks, None if none is."""
    places = {"Mul": (0, 1), "Where": (1, 2)}.get(node.op, ())
    for index in places:
        number = scalar(node.inputs[index])
        if number is not None and number < LARGE:
            return index
    return None


def _not_added_to_scores(value: Value, outputs: set[int]) -> str:
    """The first reader of `value` that is no sum which only Softmax reads; nothing where all are."""
    if id(value) in outputs:
        return "whoever reads the output"
    for node in readers(value):
        if node.op in _BETWEEN:
            other = _not_added_to_scores(node.outputs[0], outputs)
            if other:
                return other
        elif node.op != "Add" or {reader.op for reader in readers(node.outputs[0])} != {"Softmax"}:
            return str(node.name)
    return ""
