"""Rotary embedding as one onnxruntime kernel.

Legend: B batch, S tokens, H heads, D channels a head; cos, sin: constants [1, S, 1, D/2].

    x[B, S, H, D];  a, b = x[..., :D/2], x[..., D/2:];  Concat(a·cos − b·sin, a·sin + b·cos)
      ->  Reshape(com.microsoft.RotaryEmbedding(Reshape(x, [B, S, H·D]), 0, cos[S, D/2], sin[S, D/2]), [B, S, H, D])

Exact. Nine passes over the tokens become one.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, Value
from vdq_export.match import constant_operand, integers, made_by

NAME = "ort_rotary"
AFTER = ("rotary",)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op != "Concat" or len(node.inputs) != 2 or len(node.outputs[0].shape) != 4:
            continue
        minus, plus = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
        if minus is None or plus is None:
            continue
        found = _match(minus, plus)
        if isinstance(found, str):
            report.skip(node.name, found)
            continue
        _fuse(graph, node, *found)
        report.did(node.name)
    graph.cleanup()
    return report


def _match(minus: Node, plus: Node) -> tuple[Value, Array, Array] | str:
    """(x, cos, sin), or why this is not the rotation of two halves."""
    terms = [_term(t) for t in (*minus.inputs, *plus.inputs)]
    if any(t is None for t in terms):
        return "not products of halves and constants"
    (x, first, cos), (x1, second, sin), (x2, third, sin1), (x3, fourth, cos1) = [t for t in terms if t is not None]
    if not (x is x1 and x is x2 and x is x3) or (first, second, third, fourth) != (0, 1, 0, 1):
        return "not the two halves of one value"
    if not (np.array_equal(cos, cos1) and np.array_equal(sin, sin1)):
        return "the halves rotate by different angles"
    _, tokens, _, width = x.shape
    if cos.size != tokens * width // 2 or cos.shape != sin.shape or cos.ndim != 4 or cos.shape[1] != tokens:
        return "the angles are not one per token and channel pair"
    return x, cos, sin


def _term(value: Value) -> tuple[Value, int, Array] | None:
    """(x, which half, table) of half(x)·table."""
    product = made_by(value, "Mul")
    operand = constant_operand(product) if product else None
    cut = made_by(operand[0], "Slice") if operand else None
    if operand is None or cut is None or len(cut.inputs) != 4 or integers(cut.inputs[3]) not in ([3], [-1]):
        return None
    half = cut.inputs[0].shape[-1] // 2
    for index in (0, 1):
        if integers(cut.inputs[1]) == [index * half] and integers(cut.inputs[2]) == [(index + 1) * half]:
            return cut.inputs[0], index, operand[1].values
    return None


def _fuse(graph: Graph, node: Node, x: Value, cos: Array, sin: Array) -> None:
    batch, tokens, heads, width = x.shape
    path = node.name.rsplit("/", 1)[0]

    def reshaped(value: Value, shape: list[int], name: str) -> Value:
        target = graph.constant(graph.fresh(f"{path}/{name}.shape"), np.array(shape, np.int64))
        return graph.add_node("Reshape", [value, target], graph.fresh(f"{path}/{name}"), dtype=x.dtype, shape=shape)

    flat = [batch, tokens, heads * width]
    before = made_by(x, "Reshape")
    source = before.inputs[0] if before and list(before.inputs[0].shape) == flat else reshaped(x, flat, "Tokens")
    operands = [
        source,
        graph.constant(graph.fresh(f"{path}/Rotary.offset"), np.zeros(1, np.int64)),
        graph.constant(graph.fresh(f"{path}/Rotary.cos"), cos.reshape(tokens, width // 2)),
        graph.constant(graph.fresh(f"{path}/Rotary.sin"), sin.reshape(tokens, width // 2)),
    ]
    turned = graph.add_node(
        "RotaryEmbedding", operands, graph.fresh(f"{path}/Rotary"), dtype=x.dtype, shape=flat, domain="com.microsoft"
    )
    old = node.outputs[0]
    node.outputs.clear()
    graph.replace_uses(old, reshaped(turned, list(x.shape), "Heads"))
