"""The two edits that smoothing makes: a constant multiplied, and a Mul put on some readers of a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdq_export.graph import Array, Graph, Node, Value, multiply_lazily

Edge = tuple[Node, int]  # operand `int` of the node


@dataclass(frozen=True)
class Scale:
    """Multiply the constant operand `index` of `node` by `factor` (aligned to the right)."""

    node: Node
    index: int
    factor: Array
    place: int


@dataclass(frozen=True)
class Insert:
    """Let `edges` read value · factor."""

    value: Value
    edges: tuple[Edge, ...]
    factor: Array
    place: int


def apply(graph: Graph, edit: Scale | Insert) -> None:
    if isinstance(edit, Scale):
        multiply(graph, edit.node, edit.index, edit.factor)
        return
    path, _, _ = edit.value.name.rpartition("/")
    name = graph.fresh(f"{path or edit.value.name}/Mul.smooth")
    factor = graph.constant(f"{name}.factor", _trimmed(edit.factor.astype(np.float32), 1))
    shape = None if edit.value.shape is None else np.broadcast_shapes(tuple(edit.value.shape), edit.factor.shape)
    product = graph.add_node("Mul", [edit.value, factor], name, dtype=np.float32, shape=shape)
    for node, index in edit.edges:
        node.inputs[index] = product


def multiply(graph: Graph, node: Node, index: int, factor: Array, mark: str = "") -> None:
    """Let `node` read constant · factor, under the constant's name + `mark`; other readers keep the old constant."""
    constant = node.inputs[index]
    if len(constant.outputs) == 1 and len(constant.shape) == 2:
        multiply_lazily(constant, factor)
        constant.name = graph.fresh(f"{constant.name}{mark}") if mark else constant.name
        return
    values = _trimmed(constant.values * factor.astype(constant.values.dtype), constant.values.ndim)
    if len(constant.outputs) > 1:
        node.inputs[index] = graph.constant(graph.fresh(f"{constant.name}{mark or '.folded'}"), values)
    else:
        constant.values = values
        constant.name = graph.fresh(f"{constant.name}{mark}") if mark else constant.name


def _trimmed(values: Array, rank: int) -> Array:
    """Without leading dimensions of size 1 beyond `rank`: a bias stays [N], so that a linear stays one."""
    while values.ndim > rank and values.shape[0] == 1:
        values = values[0]
    return values
