"""No copy of a value that is cut along its tokens and put together again.

    Concat(Slice(x, 0 … a), Slice(x, a … b), …, Slice(x, … n)) along one axis      ->  x
    Slice(x, 0 … n)                                                                ->  x

Exact: the same numbers. Blocks whose text and video tokens run through the same layers write this between two of them;
a kernel cannot reach over it.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import integers, made_by
from vdq_export.targets.cuda._fused import is_output, remove

NAME = "rejoin"


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        whole = _rejoined(node)
        if whole is None or is_output(graph, node.outputs[0]):
            continue
        made = node.outputs[0]
        remove(node)
        graph.replace_uses(made, whole)
        report.did(node.name)
    graph.cleanup()
    return report


def _rejoined(node: Node) -> Value | None:
    if node.op not in ("Concat", "Slice") or node.domain:
        return None
    parts = [made_by(part, "Slice") for part in node.inputs] if node.op == "Concat" else [node]
    cuts = [cut for part in parts if (cut := cut_of(part)) is not None]
    if len(cuts) < len(parts):
        return None
    whole, axis, _, _ = cuts[0]
    start, rank = 0, len(whole.shape)
    for source, along, begin, end in cuts:
        if source is not whole or along != axis or begin != start:
            return None
        start = end
    joined = int(node.attrs["axis"]) % rank if node.op == "Concat" else axis
    return whole if joined == axis and start == whole.shape[axis] else None


def cut_of(node: Node | None) -> tuple[Value, int, int, int] | None:
    """(what is cut, the axis, where it begins, where it ends) of a Slice along one axis in steps of 1."""
    if node is None or len(node.inputs) < 3:
        return None
    value = node.inputs[0]
    given = [one[0] for bound in node.inputs[1:] if (one := integers(bound)) is not None and len(one) == 1]
    if len(given) < len(node.inputs) - 1 or given[3:] not in ([], [1]):
        return None
    axis = (given[2] if len(given) > 2 else 0) % len(value.shape)
    size = int(value.shape[axis])
    begin, end = (min(max(n + size if n < 0 else n, 0), size) for n in given[:2])
    return value, axis, begin, end
