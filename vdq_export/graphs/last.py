"""The layers that no other one follows: their error is the output's, whatever they are called."""

from __future__ import annotations

from vdq_export.graph import Graph


def last_layers(graph: Graph) -> tuple[str, ...]:
    """Names of the linears behind which there is neither a linear nor a convolution, in graph order.

    One, as a rule. Several where a network has several outputs; where it ends in a sum, those of its last terms.
    """
    linears = {id(one.matmul): one.name for one in graph.linears()}
    followed, found = set[str](), list[str]()  # values that a linear or convolution reads, itself or through others
    for node in reversed(graph.nodes):
        has_more = any(value.name in followed for value in node.outputs)
        if id(node) in linears and not has_more:
            found.append(linears[id(node)])
        if has_more or id(node) in linears or node.op in ("Conv", "ConvTranspose"):
            followed.update(value.name for value in node.inputs)
    return tuple(reversed(found))
