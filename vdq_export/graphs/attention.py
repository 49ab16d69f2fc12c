"""Attentions in a graph: where they are, what their operands are, what one is called in its two forms.

Legend: B batch, S queries, T keys, H heads, D channels a head.

    scores = MatMul(q[B, H, S, D], k[B, H, D, T]);  product = MatMul(Softmax(… scores …), v[B, H, T, D])
    with a mask:  p = Softmax(… scores …);  product = MatMul(Where(IsNaN(p), 0, p), v): torch's guard against -inf

An attention has the name of its scores node. Once it is one MultiHeadAttention (passes/ort_attention.py), that node is
called fused_name(scores). The fused node takes q, k and v before the constant factors and layouts: origin().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import made_by, readers, scalar, sole_reader

_BETWEEN = ("Add", "Cast", "Div", "Mul", "Where")  # scores and softmax: a scale, a mask


@dataclass(frozen=True)
class Attention:
    """One attention in its canonical form."""

    scores: Node
    softmax: Node
    product: Node

    @property
    def name(self) -> str:
        return str(self.scores.name)

    @property
    def q(self) -> Value:
        return self.scores.inputs[0]

    @property
    def k(self) -> Value:
        return self.scores.inputs[1]

    @property
    def v(self) -> Value:
        return self.product.inputs[1]

    @property
    def heads(self) -> int:
        """0 where the operands do not have their heads as the second of four axes."""
        shapes = [value.shape for value in (self.q, self.k, self.v)]
        if any(s is None or len(s) != 4 or not all(isinstance(d, int) for d in s) for s in shapes):
            return 0
        heads = {int(shape[1]) for shape in shapes}
        return heads.pop() if len(heads) == 1 else 0

    def factor(self, which: str) -> float:
        """The product of the constants that q, k or v takes behind the value a fused node reads; 4 axes each."""
        value = {"q": self.q, "k": self.k, "v": self.v}[which]
        tokens = value.shape[3 if which == "k" else 2]
        batch = value.shape[0]
        return origin(value, [batch, tokens, prod(value.shape) // (batch * tokens)])[1]


def find(graph: Graph) -> Iterator[Attention]:
    """Every attention in its canonical form, in graph order."""
    for scores in graph.attention_matmuls():
        node: Node | None = None
        value = scores.outputs[0]
        while (node := sole_reader(value, "Softmax", *_BETWEEN)) is not None and node.op != "Softmax":
            value = node.outputs[0]
        if node is None or value.shape is None or node.attrs.get("axis", -1) not in (-1, len(value.shape) - 1):
            continue
        weights = _without_nan(node.outputs[0])
        product = sole_reader(weights, "MatMul")
        if product is not None and product.inputs[0] is weights:
            yield Attention(scores, node, product)


def _without_nan(weights: Value) -> Value:
    """Where(IsNaN(weights), 0, weights) if that is all that reads them, else the weights."""
    found = readers(weights)
    check = next((node for node in found if node.op == "IsNaN"), None)
    where = sole_reader(check.outputs[0], "Where") if check else None
    if len(found) != 2 or where is None or where.inputs[2] is not weights or scalar(where.inputs[1]) != 0:
        return weights
    return where.outputs[0]


def fused_name(scores: str) -> str:
    """What the one node of an attention is called: "<path>/Attention_2" for the scores node "<path>/MatMul_2"."""
    path, slash, op = scores.rpartition("/")
    return f"{path}{slash}{op.replace('MatMul', 'Attention', 1)}" if "MatMul" in op else f"{scores}/Attention"


def origin(value: Value, target: list[int]) -> tuple[Value, float, list[Node]]:
    """(the value before scaling and layout, at the latest the one of shape `target`; the scale; the layout)."""
    scale, chain = 1.0, list[Node]()
    while list(value.shape) != target or not chain:
        if (node := made_by(value, "Mul", "Reshape", "Transpose")) is None:
            break
        if node.op == "Mul":
            factors = [scalar(t) for t in node.inputs]
            if factors.count(None) != 1:
                break
            index = factors.index(None)
            scale *= factors[1 - index] or 0.0
            value = node.inputs[index]
        else:
            chain.append(node)
            value = node.inputs[0]
    return value, scale, chain[::-1]
