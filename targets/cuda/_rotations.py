"""Block Hadamard rotations as passes/rotation.py writes them, recognised by their constants."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.hadamard import factors, is_order, matrix
from vdq_export.targets.cuda._fused import next_node

_SAME = 1e-6  # of entries, float32 and far from 0


class Rotation(NamedTuple):
    """nodes: all of it, in order. scale: what each channel is multiplied with behind it, or none."""

    nodes: tuple[Node, ...]
    block: int
    scale: Array | None


def rotation_at(graph: Graph, node: Node) -> Rotation | str | None:
    """The rotation that begins with `node`; a text where what begins there is close to one, None where it is not.

    [Reshape to blocks ->] MatMul(·, B[1, q, q]) [-> MatMul(Aᵀ[1, p, p], ·)] [-> Reshape back], H = A ⊗ B.
    """
    cut = node if node.op == "Reshape" else None
    right = next_node(graph, node.outputs[0], "MatMul") if cut else node
    if right is None or right.op != "MatMul" or not _is_matrix(right.inputs[1]):
        return None
    value, last, (p, q) = node.inputs[0], right, (1, right.outputs[0].shape[-1])
    left = next_node(graph, right.outputs[0], "MatMul")
    if left is not None and _is_matrix(left.inputs[0]):
        last, p = left, left.outputs[0].shape[-2]
    else:
        left = None
    back = next_node(graph, last.outputs[0], "Reshape") if cut else None
    nodes = tuple(one for one in (cut, right, left, back) if one is not None)
    if list(nodes[-1].outputs[0].shape) != list(value.shape) or value.shape[-1] % (p * q):
        return "the blocks are not put back as they were"
    if not is_order(p * q):
        return f"{p * q} is the order of no known Hadamard matrix"
    across, along = factors(p * q) if left else (matrix(1), matrix(q))
    scale = _column_scale(np.asarray(right.inputs[1].values[0], np.float32), along)
    if scale is None or (left is not None and (scale.size or not _equal(left.inputs[0].values[0], across.T))):
        return "it is no Hadamard matrix"
    return Rotation(nodes, p * q, np.tile(scale, value.shape[-1] // q) if scale.size else None)


def _is_matrix(value: Value) -> bool:
    return is_constant(value) and len(value.shape) == 3 and value.shape[0] == 1 and value.shape[1] == value.shape[2]


def _equal(one: Array, other: Array) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=_SAME, atol=0))


def _column_scale(found: Array, expected: Array) -> Array | None:
    """c of found = expected · diag(c), empty where c is 1 throughout, None where there is none."""
    if found.shape != expected.shape or _equal(found, expected):
        return None if found.shape != expected.shape else np.zeros(0, np.float32)
    scale = found[0] / expected[0]
    return scale if (scale > 0).all() and _equal(found, expected * scale) else None
