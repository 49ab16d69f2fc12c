"""Where the tokens of an attention's operand are: followed through reshapes and transposes by axes, not by values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import made_by, scalar

Axes = list[list[tuple[int, int]]]  # (which of B, tokens, H, D; its size), outermost first, of each dimension


def tokens(graph: Graph, value: Value, perm: Sequence[int], *, peel: bool) -> tuple[Value, float]:
    """(x[B, tokens, H·D], c) with value = c · x as [B, tokens, H, D], permuted by `perm`. Without peel c is 1."""
    apart = [int(value.shape[perm.index(axis)]) for axis in range(4)]
    merged = [*apart[:2], apart[2] * apart[3]]
    source, factor, chain = value, 1.0, list[Node]()
    outside, found = (value, 1.0), None
    while True:
        if list(source.shape) in (merged, apart) and _is_layout(source, apart, chain, perm):
            found = (source, factor)
        node = made_by(source, "Reshape", "Transpose", "Mul")
        numbers = [scalar(one) for one in node.inputs] if node is not None and node.op == "Mul" else []
        if node is None or (found and list(source.shape) == merged):
            break
        if numbers and (not peel or numbers.count(None) != 1 or 0.0 in numbers):
            break
        index = numbers.index(None) if numbers else 0
        source, factor = node.inputs[index], factor * (numbers[1 - index] or 1.0 if numbers else 1.0)
        if not numbers:
            chain.insert(0, node)
        elif not chain:
            outside = (source, factor)
    if found is None:
        source, factor = outside
        back = sorted(range(4), key=lambda axis: perm[axis])
        name = graph.fresh(f"{value.name}/Tokens")
        source = graph.add_node("Transpose", [source], name, dtype=value.dtype, shape=apart, attrs={"perm": back})
    else:
        source, factor = found
    return reshaped(graph, source, merged), factor


def reshaped(graph: Graph, value: Value, shape: Sequence[int]) -> Value:
    """`value` in that shape: itself, what it was before its own Reshape, or a Reshape of it."""
    before = made_by(value, "Reshape")
    for known in (value, *([before.inputs[0]] if before else [])):
        if list(known.shape) == list(shape):
            return known
    target = graph.constant(graph.fresh(f"{value.name}/Tokens.shape"), np.array(shape, np.int64))
    name = graph.fresh(f"{value.name}/Tokens")
    return graph.add_node("Reshape", [value, target], name, dtype=value.dtype, shape=shape)


def _is_layout(source: Value, apart: Sequence[int], chain: Sequence[Node], perm: Sequence[int]) -> bool:
    """Whether `chain` takes `source`, read as [B, tokens, H, D], to that permuted by `perm`."""
    parts = [(axis, size) for axis, size in enumerate(apart) if size > 1]
    axes: Axes | None = _grouped(parts, source.shape)
    for node in chain:
        if axes is None:
            return False
        if node.op == "Transpose":
            axes = [axes[axis] for axis in node.attrs["perm"]]
        else:
            axes = _grouped([part for group in axes for part in group], node.outputs[0].shape)
    return axes == [[(axis, apart[axis])] if apart[axis] > 1 else [] for axis in perm]


def _grouped(parts: Sequence[tuple[int, int]], shape: Sequence[int]) -> Axes | None:
    """The parts, in order, as dimensions of these sizes; None where one would have to be split."""
    waiting, axes = list(parts), Axes()
    for wanted in shape:
        group, size = list[tuple[int, int]](), 1
        while size < wanted and waiting:
            group.append(waiting.pop(0))
            size *= group[-1][1]
        if size != wanted:
            return None
        axes.append(group)
    return None if waiting else axes
