"""The edits that rotation makes: constants rotated by rows or columns, and the products that rotate a value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np

from vdq_export.errors import PassError
from vdq_export.graph import Array, Graph, Linear, Node, Value, transform_lazily
from vdq_export.hadamard import factors, rotate, unrotate_rows


def turn_rows(graph: Graph, node: Node, block: int, scale: Array, mark: str) -> None:
    """Let `node` read scale · blockdiag(H)ᵀ · W[K, N] (scale [K], or none), under the weight's name + `mark`."""

    def change(weight: Array) -> Array:
        turned = unrotate_rows(np.asarray(weight, np.float32), block)
        return turned * scale.astype(np.float32)[:, None] if scale.size else turned

    _change(graph, node, 1, change, mark)


def turn_columns(graph: Graph, linear: Linear, block: int) -> None:
    """Let the linear put out (x · W + b) · blockdiag(H)."""

    def change(constant: Array) -> Array:
        return rotate(np.asarray(constant, np.float32), block)

    _change(graph, linear.matmul, 1, change)
    if linear.add is not None:
        bias = next(index for index, t in enumerate(linear.add.inputs) if t is linear.bias)
        _change(graph, linear.add, bias, change)


def turn_value(
    graph: Graph, value: Value, readers: Sequence[Node], block: int, *, constants_last: bool = False
) -> tuple[Value, int]:
    """Let `readers` (their first operand) see value[..., K] · blockdiag(H); returns it and its multiplications a run.

    Large blocks go as Aᵀ · X[p, q] · B, H = A ⊗ B: p + q products an element instead of p · q. The matrices have rank 3
    ([1, q, q]), which no linear's weight has. constants_last: as ((X · B)ᵀ · A)ᵀ, for machines whose integer products
    take a constant as the second operand only.
    """
    if value.shape is None:
        raise PassError(f"{value.name} is to be rotated, but its shape is unknown")
    left, right = factors(block)
    (p, q), shape = (len(left), len(right)), [int(n) for n in value.shape]
    path = graph.fresh(f"{value.name.rpartition('/')[0] or value.name}/Rotate")
    plain = block == shape[-1] and p == 1 and len(shape) >= 3
    now = shape if plain else [prod(shape) // block, p, q] if p > 1 else [prod(shape[:-1]), shape[-1] // q, q]
    turned = value if plain else _reshape(graph, value, now, f"{path}.blocks")
    b = graph.constant(graph.fresh(f"{path}.hadamard"), right[None].astype(value.dtype, copy=False))
    turned = _matmul(graph, turned, b, path if plain else f"{path}.right", now)
    if p > 1 and constants_last:
        a = graph.constant(graph.fresh(f"{path}.hadamard.left"), left[None].astype(value.dtype, copy=False))
        turned = _transpose(graph, turned, f"{path}.across", [now[0], q, p])
        turned = _matmul(graph, turned, a, f"{path}.left", [now[0], q, p])
        turned = _transpose(graph, turned, f"{path}.back", now)
    elif p > 1:
        a = graph.constant(graph.fresh(f"{path}.hadamard.left"), left.T[None].astype(value.dtype, copy=False))
        turned = _matmul(graph, a, turned, f"{path}.left", now)
    turned = turned if plain else _reshape(graph, turned, shape, path)
    for node in readers:
        node.inputs[0] = turned
    return turned, prod(shape) * (q + (p if p > 1 else 0))


def _change(graph: Graph, node: Node, index: int, change: Callable[[Array], Array], mark: str = "") -> None:
    """Let `node` read the changed constant; other readers keep the old one."""
    constant = node.inputs[index]
    if len(constant.outputs) > 1:
        values = change(constant.values).astype(constant.dtype)
        node.inputs[index] = graph.constant(graph.fresh(f"{constant.name}{mark or '.turned'}"), values)
        return
    transform_lazily(constant, change)
    constant.name = graph.fresh(f"{constant.name}{mark}") if mark else constant.name


def _matmul(graph: Graph, a: Value, b: Value, name: str, shape: list[int]) -> Value:
    return graph.add_node("MatMul", [a, b], name, dtype=a.dtype, shape=shape)


def _transpose(graph: Graph, value: Value, name: str, shape: list[int]) -> Value:
    return graph.add_node("Transpose", [value], name, dtype=value.dtype, shape=shape, attrs={"perm": [0, 2, 1]})


def _reshape(graph: Graph, value: Value, shape: list[int], name: str) -> Value:
    target = graph.constant(graph.fresh(f"{name}.shape"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], name, dtype=value.dtype, shape=shape)
