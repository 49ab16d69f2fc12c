"""Attention that is still written out as one node, so that fuse_attention takes it.

Legend: B batch, S queries, T keys, H heads, D channels a head; q[B, H, S, D], k[B, H, D, T], v[B, H, T, D].

    p = Softmax(MatMul(q, k) [· c] [+ mask]);  MatMul(p, v), or MatMul(Where(IsNaN(p), 0, p), v)
      ->  MultiHeadAttention(q, k, v as [B, ·, H·D], mask)
    its operands DequantizeLinear(QuantizeLinear(·)), one scale a head, axis 1
      ->  the same of the tokens, one scale a channel, axis 2

Exact up to the order of sums; the kernels give 0 for a row that its mask takes all keys from. onnxruntime's node has no
mask that broadcasts and its pass knows fewer layouts: this is what that pass leaves. Operands are taken in front of
their layout where that is a known one, else they are laid back: two views in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, absent
from vdq_export.graphs.match import other_input, readers, scalar, sole_reader
from vdq_export.targets.cuda._fused import next_node, remove
from vdq_export.targets.cuda._layouts import reshaped, tokens
from vdq_export.targets.cuda.quantizers import code_type, codes_of, in_table, numbers, read

NAME = "gather_attention"
_QUERIES, _KEYS = (0, 2, 1, 3), (0, 2, 3, 1)  # of [B, tokens, H, D]: what the products read


class _Written(NamedTuple):
    """mask: what is added to the scores, or none; last: the product with the values."""

    scores: Node
    last: Node
    factor: float
    mask: Value | None

    @property
    def operands(self) -> tuple[Value, Value, Value]:
        return (*self.scores.inputs, self.last.inputs[1])


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for scores in graph.attention_matmuls():
        found = _written(graph, scores) if scores.outputs else None  # else it was the product of one before
        if found is None:
            continue
        shapes = [list(value.shape) for value in found.operands]
        if not _are_heads(*shapes):
            report.skip(scores.name, f"operands of {', '.join(map(str, shapes))} are not those of heads")
            continue
        _gather(graph, found)
        report.did(f"{scores.name}{' with a mask' if found.mask is not None else ''}")
    graph.cleanup()
    return report


def _are_heads(q: list[int], k: list[int], v: list[int]) -> bool:
    """Whether each has its own heads in every sample; the node knows no shared ones, nor values of another width."""
    return len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2] and q[3] == v[3]


def _written(graph: Graph, scores: Node) -> _Written | None:
    factor, mask, value = 1.0, None, scores.outputs[0]
    while (node := next_node(graph, value, "Mul", "Div", "Add")) is not None:
        other = other_input(node, value)
        number = None if other is None else scalar(other)
        if other is None or mask is not None or (node.op != "Add" and (number is None or node.inputs[0] is not value)):
            return None
        if number is None or node.op == "Add":
            mask = other
        else:
            factor = factor * number if node.op == "Mul" else factor / number
        value = node.outputs[0]
    softmax = next_node(graph, value, "Softmax")
    if softmax is None or softmax.attrs.get("axis", -1) not in (-1, len(value.shape) - 1):
        return None
    weights = _without_nan(softmax.outputs[0])
    last = next_node(graph, weights, "MatMul")
    return _Written(scores, last, factor, mask) if last is not None and last.inputs[0] is weights else None


def _without_nan(weights: Value) -> Value:
    """Where(IsNaN(weights), 0, weights) if that is all that reads them, else the weights."""
    found = readers(weights)
    check = next((node for node in found if node.op == "IsNaN"), None)
    where = sole_reader(check.outputs[0], "Where") if check else None
    if len(found) != 2 or where is None or where.inputs[2] is not weights or scalar(where.inputs[1]) != 0:
        return weights
    return where.outputs[0]


def _gather(graph: Graph, found: _Written) -> None:
    product, scale, given = found.last.outputs[0], found.factor, list[Value]()
    batch, heads, queries, width = product.shape
    for value, perm in zip(found.operands, (_QUERIES, _KEYS, _QUERIES), strict=True):
        one, factor = _operand(graph, value, perm, peel=value is not found.operands[2])
        given.append(one)
        scale *= factor
    if found.mask is not None:
        given += [absent(), absent(), found.mask]
    turned = next_node(graph, product, "Transpose")
    merged = next_node(graph, turned.outputs[0], "Reshape") if turned else None
    shape, path = [batch, queries, heads * width], found.scores.name
    made = graph.add_node(
        "MultiHeadAttention", given, graph.fresh(f"{path}/Attention"), dtype=product.dtype, shape=shape,
        attrs={"num_heads": heads, "scale": scale}, domain="com.microsoft",
    )  # fmt: skip
    if (
        turned is not None
        and merged is not None
        and list(turned.attrs["perm"]) == list(_QUERIES)
        and list(merged.outputs[0].shape) == shape
    ):
        old = merged.outputs[0]
    else:  # laid out as it was
        old, made = product, reshaped(graph, made, [batch, queries, heads, width])
        name = graph.fresh(f"{path}/Heads")
        attrs = {"perm": list(_QUERIES)}
        made = graph.add_node("Transpose", [made], name, dtype=product.dtype, shape=product.shape, attrs=attrs)
    remove(old.inputs[0])
    graph.replace_uses(old, made)


def _operand(graph: Graph, value: Value, perm: tuple[int, ...], *, peel: bool) -> tuple[Value, float]:
    """(q, k or v as [B, tokens, H·D], what it is to be multiplied with), quantized as it was."""
    quantize = codes_of(value)
    how = read(graph, quantize) if quantize is not None else ""
    scales = None if isinstance(how, str) or how.zero is not None or how.axis != 1 else numbers(how.scale)
    if quantize is None or isinstance(how, str) or scales is None or scales.shape[1] != value.shape[1]:
        return tokens(graph, value, perm, peel=peel)
    x, factor = tokens(graph, how.value, perm, peel=peel)
    channels = np.repeat(scales / np.float32(abs(factor)), x.shape[2] // scales.shape[1], axis=1)
    name, dtype = graph.fresh(f"{quantize.name}/Tokens"), code_type(how.dtype)
    zeros = graph.constant(graph.fresh(f"{name}.zero_point"), np.zeros(x.shape[2], dtype))
    parameters = [in_table(graph, how.scale, channels), zeros]
    q = graph.add_node("QuantizeLinear", [x, *parameters], name, dtype=dtype, shape=x.shape, attrs={"axis": 2})
    name = graph.fresh(f"{name}/Back")
    back = graph.add_node("DequantizeLinear", [q, *parameters], name, dtype=x.dtype, shape=x.shape, attrs={"axis": 2})
    return back, factor
