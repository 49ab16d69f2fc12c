"""Layout changes in at most five dimensions.

NPUs stop at rank 5; patches are put together (and taken apart) in six to eight. A chain of Reshape, Transpose, Squeeze
and Unsqueeze that goes beyond rank 5 is one permutation of axes that it does not cut. Axes of length 1 do not count
and neighbours that stay neighbours are one axis, so that mostly one Transpose of rank 5 remains, else a few:

    Einsum("nfhwc->ncfhw", x)                                  ->  Transpose(x, [0, 4, 1, 2, 3])
    Reshape(Transpose(Reshape(x, [1,F,H,W,1,2,2,C]), [0,7,1,4,2,5,3,6]), [1,C,F,2H,2W])
      ->  Reshape(Transpose(Reshape(x, [F·H, W, 2, 2, C]), [4, 0, 2, 1, 3]), [1, C, F, 2H, 2W])
    n > 5 axes that all move apart                             ->  (Reshape, Transpose) twice or more, then Reshape

Exact: every element keeps its bytes and ends where it was. A step more costs one more pass over the elements. Left
alone, with the reason: values above rank 5 that anything but layout changes makes or reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.passes._axes import Layout, Move, steps

NAME = "rank_limit"
AFTER = ("fold_constants", "no_ops")
LIMIT = 5
_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        perm = _einsum_permutation(node)
        if perm is not None:
            node.op, node.attrs = "Transpose", {"perm": perm}
            report.did(f"{node.name}: Einsum that only moves axes")
    for node in graph.nodes:
        if not _high(node.inputs[:1]) or _high(node.outputs):
            continue
        chain = _chain(node)
        if isinstance(chain, str):
            report.skip(node.name, chain)
            continue
        count = _replace(graph, chain)
        report.did(f"{node.name}: {len(chain)} nodes up to rank {_rank(chain)} are {count} Transpose of rank 5 or less")
    graph.cleanup()
    for node in graph.nodes:
        if _high(node.outputs) and not any(skip.where == node.name for skip in report.skipped):
            report.skip(node.name, f"{node.op} of rank {_rank([node])}: not between layout changes")
    return report


def _einsum_permutation(node: Node) -> list[int] | None:
    """The perm of a Transpose that does what an Einsum of one operand does, None if there is none."""
    if node.op != "Einsum" or len(node.inputs) != 1:
        return None
    before, arrow, after = node.attrs["equation"].replace(" ", "").partition("->")
    distinct = len(set(before)) == len(before)
    if not arrow or not distinct or "." in before or sorted(before) != sorted(after):
        return None
    return [before.index(letter) for letter in after]


def _high(values: Sequence[Value]) -> bool:
    return any(len(value.shape or ()) > LIMIT for value in values)


def _rank(nodes: list[Node]) -> int:
    return max(len(value.shape) for node in nodes for value in node.outputs if value.shape is not None)


def _chain(end: Node) -> list[Node] | str:
    """The layout nodes from a value of rank <= 5 through ones above it to `end`, or why there is no such chain."""
    chain = [end]
    while True:
        first = chain[0]
        if first.op not in _LAYOUT:
            return f"{first.op} of a value of rank {len(first.inputs[0].shape)} is no layout change"
        if not _high(first.inputs[:1]):
            return chain
        if not first.inputs[0].inputs:
            return f"{first.inputs[0].name} is no computed value"
        chain.insert(0, first.inputs[0].inputs[0])


def _replace(graph: Graph, chain: list[Node]) -> int:
    """Let the last node of `chain` read its first node's input through low-rank steps; returns their number."""
    end, value = chain[-1], chain[0].inputs[0]
    layout = Layout(value.shape)
    for node in chain:
        if node.op == "Transpose":
            layout.transpose(node.attrs.get("perm", list(range(len(node.inputs[0].shape)))[::-1]))
        else:
            layout.reshape(node.outputs[0].shape)
    moves: list[Move] = [step for move in layout.done() for step in steps(move, LIMIT)]
    path = end.name.rpartition("/")[0]
    for sizes, order in moves:
        shape = _shape(graph, path, sizes)
        value = graph.add_node("Reshape", [value, shape], shape.name[:-2], dtype=end.outputs[0].dtype, shape=sizes)
        name = graph.fresh(f"{path}/Transpose.steps".lstrip("/"))
        turned = [sizes[axis] for axis in order]
        value = graph.add_node("Transpose", [value], name, dtype=value.dtype, shape=turned, attrs={"perm": list(order)})
    shape = _shape(graph, path, end.outputs[0].shape)
    end.op, end.attrs = "Reshape", {}
    end.inputs.clear()
    end.inputs.extend([value, shape])
    return len(moves)


def _shape(graph: Graph, path: str, sizes: Sequence[int]) -> Value:
    name = graph.fresh(f"{path}/Reshape.steps".lstrip("/"))
    return graph.constant(graph.fresh(f"{name}.1"), np.array(sizes, np.int64))
