"""Which operands must be multiplied by what, so that a node's output is multiplied by a channel factor f.

MatMul(a, b)·f = MatMul(a, b·f)        f along the last axis (a linear's columns; V of an attention)
(a ± b)·f = a·f ± b·f                  both operands
(a · b)·f = (a·f) · b = a · (b·f)      either operand
(a ÷ b)·f = (a·f) ÷ b = a ÷ (b ÷ f)    either operand, b only where it is a constant
LayerNorm(x; w, b)·f = LayerNorm(x; w·f, b·f)
Reshape, Transpose, Split, Concat      f is reshaped alike; what other parts of the operand get is 1
ReLU(x)·f = ReLU(x·f)                  f > 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from vdq_export.graph import Array, Node, Value, is_constant
from vdq_export.passes import _channel_factor as channel


@dataclass(frozen=True)
class Need:
    """Operand `index` must be multiplied by `factor`; place: what DESIGN calls it if it is a constant (0: nothing)."""

    index: int
    factor: Array
    place: int = 0


Alternatives = list[list[Need]]  # each inner list is enough on its own
Rule = Callable[[Node, Value, Array], "Alternatives | str"]  # text: why not


def alternatives(node: Node, value: Value, factor: Array) -> Alternatives | str:
    """Ways to multiply `value`, an output of `node`, by `factor` (of its rank); or why there is none."""
    if node.op not in _RULES or node.domain not in (None, "", "ai.onnx"):
        return f"{node.name} ({node.op}) does not commute with a channel factor"
    if any(t.shape is None for t in [*node.inputs, *node.outputs]):
        return f"{node.name}: unknown shapes"
    return _RULES[node.op](node, value, factor)


def is_norm(value: Value) -> bool:
    return bool(value.inputs) and "Normalization" in value.inputs[0].op


def _through(node: Node, value: Value, factor: Array) -> Alternatives:
    return [[Need(0, factor)]]


def _reshape(node: Node, value: Value, factor: Array) -> Alternatives:
    return [[Need(0, channel.before_reshape(factor, value.shape, node.inputs[0].shape))]]


def _transpose(node: Node, value: Value, factor: Array) -> Alternatives:
    perm = node.attrs.get("perm", list(range(factor.ndim))[::-1])
    return [[Need(0, np.transpose(factor, np.argsort(perm)))]]


def _split(node: Node, value: Value, factor: Array) -> Alternatives:
    axis = node.attrs.get("axis", 0) % factor.ndim
    at = next(i for i, o in enumerate(node.outputs) if o is value)
    return [[Need(0, channel.before_split(factor, axis, [o.shape[axis] for o in node.outputs], at))]]


def _concat(node: Node, value: Value, factor: Array) -> Alternatives:
    axis = node.attrs["axis"] % factor.ndim
    parts = channel.before_concat(factor, axis, [t.shape[axis] for t in node.inputs])
    return [[Need(i, part) for i, part in enumerate(parts)]]


def _sum(node: Node, value: Value, factor: Array) -> Alternatives:
    return [[Need(0, factor), Need(1, factor)]]


def _product(node: Node, value: Value, factor: Array) -> Alternatives:
    return [[Need(i, factor, 1 if _is_normalised(node.inputs[1 - i]) else 2)] for i in (0, 1)]


def _quotient(node: Node, value: Value, factor: Array) -> Alternatives:
    return [[Need(1, 1 / factor, 2)] if is_constant(node.inputs[1]) else [Need(0, factor, 2)]]


def _matmul(node: Node, value: Value, factor: Array) -> Alternatives | str:
    columns = channel.before_matmul(factor, node.inputs[1].shape)
    return (
        f"{node.name}: its right operand's columns do not match the factor"
        if columns is None
        else [[Need(1, columns, 2)]]
    )


def _norm(node: Node, value: Value, factor: Array) -> Alternatives | str:
    axis = node.attrs.get("axis", -1) % factor.ndim
    weights = [i for i in (1, 2) if i < len(node.inputs) and not node.inputs[i].is_empty()]
    if prod(factor.shape[:axis]) != 1 or value is not node.outputs[0]:
        return f"{node.name}: the factor is not along the normalised axes"
    if not all(is_constant(node.inputs[i]) for i in weights):
        return f"{node.name}: its weight is computed"
    return [[Need(i, factor, 1) for i in weights]]


def _is_normalised(value: Value) -> bool:
    """x ÷ √… or x · (1/√…): a constant multiplied to it is an RMSNorm's weight."""
    if not value.inputs or value.inputs[0].op not in ("Div", "Mul"):
        return is_norm(value)
    return any(t.inputs and t.inputs[0].op in ("Sqrt", "Reciprocal") for t in value.inputs[0].inputs)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Identity", "Relu", "LeakyRelu"), _through),
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshape),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _norm),
    "Transpose": _transpose, "Split": _split, "Concat": _concat, "Mul": _product, "Div": _quotient, "MatMul": _matmul,
}  # fmt: skip
