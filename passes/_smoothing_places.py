"""Where a graph absorbs "multiply this value by a channel factor" at the least run-time cost; reads it, edits nothing.

A factor is an array of its value's rank, each dimension 1 or the value's own. It goes from the value to the operands of
the node that makes it (`_commuting_ops`), and on, until constants take it or a Mul has to be inserted. A value someone
else reads as well stays as it is: only the edge asked for is multiplied. Cost: elements multiplied a run.

Places, cheapest first, DESIGN's numbers: 1 norm weight; 2 the producer's constants; 4 the constants that make a
per-sample vector (AdaLN's γ, β); 3 a Mul on such a vector; 5 a Mul on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.passes import _channel_factor as channel
from vdq_export.passes._commuting_ops import Need, alternatives, is_norm
from vdq_export.passes._smoothing_edits import Edge, Insert, Scale

ORDER = (0, 1, 2, 4, 3, 5)  # 0: a constant that only follows along
UNKNOWN = 2**62  # elements of a value without a shape: the last place to multiply


@dataclass(frozen=True)
class Way:
    """One way to absorb a factor: what to edit, what it costs a run, and why no cheaper place took it: (place, why)."""

    edits: tuple[Scale | Insert, ...] = ()
    cost: int = 0
    refused: tuple[tuple[int, str], ...] = ()

    @property
    def place(self) -> int:
        """The costliest place among its edits."""
        return max((e.place for e in self.edits), key=ORDER.index, default=0) or 2


class Search:
    """Finds the cheapest Way in one graph."""

    def __init__(self, graph: Graph) -> None:
        self._outputs = {id(o) for o in graph.gs.outputs}

    def value(self, value: Value, edges: Sequence[Edge], factor: Array, vector: bool = False) -> Way:
        """Way to let `edges`, and no other reader, see value · factor. vector: `value` is part of AdaLN's γ, β."""
        if value.shape is not None:
            factor = channel.aligned(factor, len(value.shape))
        cost = _elements(value, factor)
        found = self._obstacle(value, edges, cost) or self._maker(value.inputs[0], value, factor, vector)
        if isinstance(found, Way) and found.cost < cost:
            return found
        refused = found.refused if isinstance(found, Way) else ((4 if vector else 1 if is_norm(value) else 2, found),)
        return Way((Insert(value, tuple(edges), factor, 3 if vector else 5),), cost, refused)

    def _obstacle(self, value: Value, edges: Sequence[Edge], cost: int) -> str:
        """Why `value` cannot change as a whole, or nothing."""
        others = [node.name for node in value.outputs if not any(node is reader for reader, _ in edges)]
        if others:
            return f"{value.name} is also read by {others[0]}"
        if id(value) in self._outputs or len(value.outputs) > len(edges):
            return f"{value.name} is also an output of the graph, or read twice by one node"
        if not value.inputs:
            return f"{value.name} is an input of the graph"
        return "" if cost == _elements(value) else f"{value.name} is broadcast along the channels"

    def _maker(self, node: Node, value: Value, factor: Array, vector: bool) -> Way | str:
        """The best of what `node`, which makes `value`, offers."""
        offers = alternatives(node, value, factor)
        if isinstance(offers, str):
            return offers
        ways = [_together([self._operand(node, value, need, vector) for need in needs]) for needs in offers]
        best = min(ways, key=lambda way: (way.cost, ORDER.index(way.place)))
        return Way(best.edits, best.cost, sum((way.refused for way in ways), ())) if best.cost else best

    def _operand(self, node: Node, value: Value, need: Need, vector: bool) -> Way:
        """Way to let `node` see its operand multiplied; a constant takes the factor itself."""
        operand = node.inputs[need.index]
        if is_constant(operand):
            place = 4 if vector and need.place else need.place
            return Way((Scale(node, need.index, need.factor, place),))
        # Smaller than the tokens it is broadcast to: one of AdaLN's per-sample vectors 1 + γ, β.
        beside = node.op in ("Add", "Sub", "Mul") and _elements(operand) < _elements(value)
        return self.value(operand, [(node, need.index)], need.factor, vector or beside)


def _together(ways: Sequence[Way]) -> Way:
    edits = tuple(e for way in ways for e in way.edits)
    return Way(edits, sum(way.cost for way in ways), tuple(r for way in ways for r in way.refused))


def _elements(value: Value, factor: Array | None = None) -> int:
    """Size of `value`, or of value · factor, which broadcasting may enlarge."""
    if value.shape is None:
        return UNKNOWN
    return prod(value.shape if factor is None else np.broadcast_shapes(tuple(value.shape), factor.shape))
