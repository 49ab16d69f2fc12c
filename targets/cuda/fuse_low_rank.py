"""The second factor of a low-rank branch in the kernel of its linear.

Legend: M rows, N output channels, r rank; low[M, r]: the first factor's product, or columns of one for several linears.

    [Reshape](Gemm(low, U[r, N], C = [Reshape](Linear(x))))   ->   Linear(x, low, U)

Exact: the kernel adds low · U to its sum in float32. Only to a Linear that does nothing behind its sum yet.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.targets.cuda._fused import absorb, fused_by, next_node, operand, put, remove

NAME = "fuse_low_rank"
_LATER = ("low", "gate", "residual", "post", "out_scale")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op != "Gemm" or len(node.inputs) != 3 or not is_constant(node.inputs[1]):
            continue
        found = _match(graph, node)
        if isinstance(found, str):
            report.skip(node.name, found)
            continue
        linear, last = found
        low, up = node.inputs[:2]
        if last is not node:
            remove(node)
        absorb(linear, last)
        put(linear, low=low, up=up)
        report.did(linear.name)
    graph.cleanup()
    return report


def _match(graph: Graph, node: Node) -> tuple[Node, Node] | str:
    """(the linear, the last node of the branch), or why there is none."""
    if any(node.attrs.get(k, d) != d for k, d in (("alpha", 1.0), ("beta", 1.0), ("transA", 0), ("transB", 0))):
        return "a Gemm that transposes or scales"
    main = _unflattened(node.inputs[2])
    linear = fused_by(main, "Linear")
    if linear is None or linear.outputs[0] is not main or next_node(graph, main, "Gemm", "Reshape") is None:
        return "it adds to no linear, or others read that one's output"
    if next_node(graph, node.inputs[2], "Gemm") is None:
        return "others read the linear's rows"
    if any(operand(linear, one) is not None for one in _LATER) or linear.attrs.get("act", "none") != "none":
        return "the linear goes on behind its sum"
    reshaped = next_node(graph, node.outputs[0], "Reshape")
    if list(node.outputs[0].shape) == list(main.shape):
        return linear, node
    if reshaped is None or list(reshaped.outputs[0].shape) != list(main.shape):
        return "the sum gets another shape than the linear's output has"
    return linear, reshaped


def _unflattened(value: Value) -> Value:
    """What was reshaped to [M, N]."""
    node = value.inputs[0] if value.inputs else None
    return node.inputs[0] if node is not None and node.op == "Reshape" and not node.domain else value
