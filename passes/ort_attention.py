"""Attention as one onnxruntime kernel.

Legend: B batch, S queries, T keys, H heads, D channels a head, C = H·D.

    q = layout(Q)[B, H, S, D];  k = layout(K)[B, H, D, T];  v = layout(V)[B, H, T, D]         q, k times constants
    Reshape(Transpose(MatMul(Softmax(MatMul(q, k)), v)), [B, S, C])
      ->  com.microsoft.MultiHeadAttention(Q[B, S, C], K[B, T, C], V[B, T, C], num_heads=H, scale)

Exact up to the order of sums. Each layout is a chain of Reshape and Transpose; whether it is the expected one is
settled by sending element numbers through it. The kernel works on tiles that stay in cache: no [S, T] matrix in memory,
no transposed copies of q, k and v, but of those that are graph inputs and come transposed.
"""

from __future__ import annotations

from math import prod

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.attention import fused_name, origin
from vdq_export.graphs.match import sole_reader

NAME = "ort_attention"
AFTER = ("linear", "no_ops")
_LIMIT = 1 << 26  # elements whose numbers are sent through a layout


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for scores in graph.attention_matmuls():
        softmax = sole_reader(scores.outputs[0], "Softmax")
        product = sole_reader(softmax.outputs[0], "MatMul") if softmax else None
        if softmax is None or product is None:
            continue
        reason = _fuse(graph, scores, softmax, product)
        if reason:
            report.skip(scores.name, reason)
        else:
            report.did(scores.name)
    graph.cleanup()
    return report


def _fuse(graph: Graph, scores: Node, softmax: Node, product: Node) -> str:
    """Make the edit, or say why not."""
    if product.inputs[0] is not softmax.outputs[0] or softmax.attrs.get("axis", -1) not in (-1, 3):
        return "not the softmax over keys times values"
    turned = sole_reader(product.outputs[0], "Transpose")
    merged = sole_reader(turned.outputs[0], "Reshape") if turned else None
    if turned is None or merged is None or list(turned.attrs["perm"]) != [0, 2, 1, 3]:
        return "the heads are not merged behind it"
    batch, heads, queries, _ = scores.outputs[0].shape
    width = product.outputs[0].shape[-1]
    if merged.outputs[0].shape != [batch, queries, heads * width]:
        return "the heads are not merged into channels"
    keys = scores.outputs[0].shape[-1]
    wanted = [
        (scores.inputs[0], queries, (0, 2, 1, 3)),
        (scores.inputs[1], keys, (0, 2, 3, 1)),
        (product.inputs[1], keys, (0, 2, 1, 3)),
    ]
    sources, factor = [], 1.0
    for value, tokens, perm in wanted:
        shape = (batch, tokens, heads, prod(value.shape) // (batch * tokens * heads))
        source, scale, chain = origin(value, [batch, tokens, heads * shape[3]])
        if prod(shape) <= _LIMIT and _is_layout(source, chain, shape, perm):
            pass
        elif not source.inputs and not chain and list(source.shape) == [shape[axis] for axis in perm]:
            source = _laid_back(graph, source, shape, perm)
        else:
            return f"{value.name} is laid out in a way not known"
        if value is product.inputs[1] and scale != 1.0:
            return f"{value.name} is scaled, which the kernel cannot"
        sources.append(_three_axes(graph, source, [batch, tokens, heads * shape[3]]))
        factor *= scale
    old = merged.outputs[0]
    attention = graph.add_node(
        "MultiHeadAttention", sources, graph.fresh(fused_name(scores.name)), dtype=old.dtype, shape=old.shape,
        attrs={"num_heads": heads, "scale": factor}, domain="com.microsoft",
    )  # fmt: skip
    merged.outputs.clear()
    graph.replace_uses(old, attention)
    return ""


def _is_layout(source: Value, chain: list[Node], shape: tuple[int, ...], perm: tuple[int, ...]) -> bool:
    """Whether `chain` takes `source`, read as [B, tokens, H, D], to that shape permuted by `perm`."""
    if prod(source.shape) != prod(shape):
        return False
    numbers = np.arange(prod(shape), dtype=np.int32)
    moved = numbers.reshape(source.shape)
    for node in chain:
        moved = moved.reshape(node.outputs[0].shape) if node.op == "Reshape" else moved.transpose(node.attrs["perm"])
    expected = numbers.reshape(shape).transpose(perm)
    return moved.shape == expected.shape and np.array_equal(moved, expected)


def _laid_back(graph: Graph, source: Value, shape: tuple[int, ...], perm: tuple[int, ...]) -> Value:
    """[B, tokens, H, D] of a graph input that comes laid out: keys and values of the prompt, hoisted."""
    back = sorted(range(4), key=lambda axis: perm[axis])
    name = graph.fresh(f"{source.name}/Tokens")
    return graph.add_node("Transpose", [source], name, dtype=source.dtype, shape=shape, attrs={"perm": back})


def _three_axes(graph: Graph, value: Value, shape: list[int]) -> Value:
    if list(value.shape) == shape:
        return value
    path = value.name.rsplit("/", 1)[0]
    target = graph.constant(graph.fresh(f"{path}/Tokens.shape"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], graph.fresh(f"{path}/Tokens"), dtype=value.dtype, shape=shape)
