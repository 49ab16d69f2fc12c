"""Orders a graph's nodes so that onnxruntime has one of its weights in float at a time.

A DequantizeLinear of a constant may run at any time, and what it makes is held until its reader has run. onnxruntime
finds its order by going back from the outputs, at each node to the maker that stands last in the file first. So of a
DequantizeLinear that stands right before its reader, it runs all that leads to the reader's other operand afterwards:
all weights of a chain are in float before its first linear runs. Where they stand before everything else, each runs
right before its reader.
"""

from __future__ import annotations

from vdq_export.graph import Graph, Node, is_constant


def dequantize_late(graph: Graph) -> None:
    """Put every DequantizeLinear of a constant in front, in the order there is; so with the other nodes."""
    nodes = graph.nodes
    graph.gs.nodes = [*(node for node in nodes if _movable(node)), *(node for node in nodes if not _movable(node))]


def _movable(node: Node) -> bool:
    return node.op == "DequantizeLinear" and all(map(is_constant, node.inputs))
