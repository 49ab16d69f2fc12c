"""Norms over the last axis, as their one or five nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import constant_operand, is_root_mean_square, made_by, scalar
from vdq_export.targets.cuda._fused import next_node
from vdq_export.targets.cuda._operands import is_channels


@dataclass(frozen=True)
class Norm:
    """kind: layer or rms. weight, bias: constants, one number a channel."""

    kind: str
    x: Value
    epsilon: float
    weight: Value | None = None
    bias: Value | None = None

    @property
    def attrs(self) -> dict[str, str | float]:
        return {"norm": self.kind, "epsilon": self.epsilon}


def norm_at(node: Node) -> Norm | None:
    """The norm whose result is the node's: LayerNormalization, or x / √(mean(x²) + ε) without its weight."""
    if node.op == "LayerNormalization" and len(node.outputs) == 1:
        x, *factors = node.inputs
        if node.attrs.get("axis", -1) not in (-1, len(x.shape) - 1):
            return None
        if not all(is_channels(one, x.shape[-1]) for one in factors if one.name):
            return None
        weight, bias = (*(one if one.name else None for one in factors), None, None)[:2]
        weight = None if weight is None or (np.asarray(weight.values) == 1).all() else weight
        return Norm("layer", x, float(node.attrs.get("epsilon", 1e-5)), weight, bias)
    root = made_by(node.inputs[1], "Sqrt") if node.op == "Div" else None
    if root is None or not is_root_mean_square(root, node.inputs[0]):
        return None
    epsilon = next(e for t in root.inputs[0].inputs[0].inputs if (e := scalar(t)) is not None)
    return Norm("rms", node.inputs[0], epsilon)


def norm_of(graph: Graph, value: Value) -> Norm | None:
    """The norm whose result, times its weight, `value` is; None where others read what it computes on the way."""
    found = made_by(value, "LayerNormalization", "Div")
    product = made_by(value, "Mul")
    pair = constant_operand(product) if product else None
    if found is not None or product is None or pair is None or not is_channels(pair[1], value.shape[-1]):
        return norm_at(found) if found else None
    inner = made_by(pair[0], "LayerNormalization", "Div") if next_node(graph, pair[0], "Mul") else None
    norm = norm_at(inner) if inner else None
    return replace(norm, weight=pair[1]) if norm and norm.weight is None and norm.bias is None else None
