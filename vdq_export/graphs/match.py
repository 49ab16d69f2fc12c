"""Small questions passes ask about the neighbourhood of a node. Each returns None (or False) where the answer is no."""

from __future__ import annotations

from math import prod

import numpy as np

from vdq_export.graph import Node, Value, is_constant, is_unbound


def made_by(value: Value, *ops: str) -> Node | None:
    """The node that computes `value`, when its op is one of `ops`."""
    if is_constant(value) or not value.inputs:
        return None
    node = value.inputs[0]
    return node if node.op in ops else None


def sole_reader(value: Value, *ops: str) -> Node | None:
    """The only node that reads `value` (once), when its op is one of `ops`."""
    readers = list(value.outputs)
    return readers[0] if len(readers) == 1 and readers[0].op in ops else None


def readers(value: Value) -> list[Node]:
    """Distinct nodes that read `value`, in graph order."""
    return list({id(node): node for node in value.outputs}.values())


def other_input(node: Node, value: Value) -> Value | None:
    """The second operand of a two-input node one of whose operands is `value`."""
    others = [t for t in node.inputs if t is not value]
    return others[0] if len(node.inputs) == 2 and len(others) == 1 else None


def constant_operand(node: Node) -> tuple[Value, Value] | None:
    """(computed operand, constant one) of a two-input node that has one of each."""
    if len(node.inputs) != 2 or is_constant(node.inputs[0]) == is_constant(node.inputs[1]):
        return None
    computed, fixed = sorted(node.inputs, key=is_constant)
    return computed, fixed


def scalar(value: Value) -> float | None:
    """The number a one-element constant holds."""
    if not is_constant(value) or prod(value.shape) != 1 or is_unbound(value):
        return None
    return float(np.asarray(value.values).reshape(()))


def integers(value: Value) -> list[int] | None:
    """The entries of an integer constant, flattened."""
    if not is_constant(value) or not np.issubdtype(value.dtype, np.integer):
        return None
    return [int(v) for v in np.asarray(value.values).reshape(-1)]


def reduced_axes(node: Node) -> list[int] | None:
    """Axes of a Reduce* node, counted from the end (negative), whether an attribute (old opsets) or an input."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        axes = integers(node.inputs[1])
    rank = len(node.inputs[0].shape)
    return None if axes is None else [a - rank if a >= 0 else a for a in axes]


def is_root_mean_square(root: Node, value: Value) -> bool:
    """Whether `root` is Sqrt(ReduceMean(value², last axis) + ε)."""
    plus = made_by(root.inputs[0], "Add")
    mean = next((m for t in plus.inputs if (m := made_by(t, "ReduceMean"))), None) if plus else None
    if root.op != "Sqrt" or plus is None or mean is None or reduced_axes(mean) != [-1]:
        return False
    epsilon = other_input(plus, mean.outputs[0])
    square = made_by(mean.inputs[0], "Pow", "Mul")
    if epsilon is None or scalar(epsilon) is None or square is None or square.inputs[0] is not value:
        return False
    return scalar(square.inputs[1]) == 2.0 if square.op == "Pow" else square.inputs[1] is value
