"""Where to cut a graph between what is computed ahead and what is computed at every step: the cheapest cut.

A node may be computed ahead if its inputs can be; computing it at every step costs its work, and a value that is
computed ahead and read at every step costs its size. The cut of least total cost is a minimum s-t cut:

    s ──work──> node ──crossing──> value ──∞──> each reader        a value crosses once, however many read it
                node ──∞──> makers of its inputs                   ahead only if what it needs is ahead
                value ──∞──> t                                     read by a node that runs at every step

Of equally cheap cuts the one with most nodes ahead is taken; it is unique, so the result does not depend on the order
of anything. Costs, in units of one multiply-add of a matrix product:

    MULTIPLY_ADD   1   each in MatMul, Gemm, Conv, Einsum
    MOVED          1   an element of an operator's output that is only copied (Reshape, Split, Transpose …)
    COMPUTED       8   an element of any other operator's output
    CONSTANT       8   an element of a constant operand: a weight read at every step
    CROSSING      32   an element that crosses: written by the host, read by the step, stored for each timestep
    VALUE       8000   a value that crosses, whatever its size: an input to bind, a table to keep

So linears of the prompt and of the timestep's embedding are computed ahead, with all that follows until it gets wide;
broadcasts, and small vectors added to one that all blocks share (Wan's modulation), stay at every step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import prod
from typing import Any

import networkx as nx
import numpy as np
import onnx

from vdq_export.graph import Node, Value, is_constant

MULTIPLY_ADD, MOVED, COMPUTED, CONSTANT, CROSSING, VALUE = 1, 1, 8, 8, 32, 8000
COPIES = frozenset(
    ("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile",
     "Transpose", "Unsqueeze")
)  # fmt: skip
_S, _T = 0, 1


def cheapest(
    candidates: Sequence[Node],
    inputs: Sequence[Value],
    steps: Sequence[Node],
    *,
    constants: Collection[str] = (),
    kept: Collection[str] = (),
    crossing: Collection[str] = (),
    settled: Collection[str] = (),
) -> set[str]:
    """Names of those `candidates` that are best computed ahead.

    inputs: graph inputs known ahead. steps: nodes that run at every step whatever is decided. constants: names of
    values that are computed from constants alone, free on both sides. kept: values whose makers run at every step.
    crossing: values that cross anyway, so that their makers are computed ahead. settled: names of candidates that are
    computed ahead whatever it costs; what they need must not be kept.
    """
    number = {id(node): 2 + index for index, node in enumerate(candidates)}
    network = nx.DiGraph()
    network.add_nodes_from((_S, _T, *number.values()))
    for node in candidates:
        here = number[id(node)]
        decided = node.name in settled or any(value.name in crossing for value in node.outputs)
        network.add_edge(_S, here, **_limit(None if decided else step_cost(node, constants)))
        for maker in (maker for value in node.inputs for maker in value.inputs):
            if id(maker) in number:
                network.add_edge(here, number[id(maker)])
        if any(value.name in kept for value in node.outputs):
            network.add_edge(here, _T)
    at_steps = {id(node) for node in steps}
    for place, value in _values(candidates, inputs, number):
        if value.name in crossing or not value.outputs:
            continue
        across = network.number_of_nodes()
        network.add_edge(place, across, **_limit(crossing_cost(value)))
        for reader in value.outputs:
            if id(reader) in number:
                network.add_edge(across, number[id(reader)])
            elif id(reader) in at_steps:
                network.add_edge(across, _T)
    _, (ahead, _) = nx.minimum_cut(network, _S, _T)
    return {str(node.name) for node in candidates if number[id(node)] in ahead}


def _values(candidates: Sequence[Node], inputs: Sequence[Value], number: dict[int, int]) -> Iterator[tuple[int, Value]]:
    """(where it comes from in the network, value), of all values that could cross."""
    yield from ((_S, value) for value in inputs)
    yield from ((number[id(node)], value) for node in candidates for value in node.outputs)


def _limit(cost: int | None) -> dict[str, int]:
    """Attributes of an edge; without a capacity it cannot be cut."""
    return {} if cost is None else {"capacity": cost}


def crossing_cost(value: Value) -> int | None:
    """Cost of `value` as an input of every step; None: it cannot be one, its type or shape is not known."""
    if not described(value):
        return None
    return VALUE + CROSSING * elements(value)


def step_cost(node: Node, constants: Collection[str] = ()) -> int:
    """Cost of running `node` at every step."""
    fixed = sum(elements(value) for value in node.inputs if is_constant(value) or value.name in constants)
    made = sum(elements(value) for value in node.outputs)
    own = made * (MOVED if node.op in COPIES else COMPUTED)
    return own + MULTIPLY_ADD * multiply_adds(node) + CONSTANT * fixed


def multiply_adds(node: Node) -> int:
    """Multiply-adds of one run of a MatMul, Gemm, Conv or Einsum; 0 for others, and where a shape is not known."""
    if node.op not in ("MatMul", "Gemm", "Conv", "Einsum") or not all(_sized(v) for v in (*node.inputs, *node.outputs)):
        return 0
    made = elements(node.outputs[0])
    if node.op == "MatMul":
        return made * int(node.inputs[0].shape[-1])
    if node.op == "Gemm":
        return made * int(node.inputs[0].shape[0 if node.attrs.get("transA", 0) else 1])
    if node.op == "Conv":
        return made * prod(int(size) for size in node.inputs[1].shape[1:])
    return _einsum(node)


def _einsum(node: Node) -> int:
    """The product of all letters' sizes; 0 for one operand, which is only rearranged, and for ellipses."""
    equation = str(node.attrs.get("equation", "")).replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) < 2 or "." in equation:
        return 0
    sizes = {
        letter: int(size)
        for term, value in zip(terms, node.inputs, strict=True)
        for letter, size in zip(term, value.shape, strict=True)
    }
    return prod(sizes.values())


def described(value: Value) -> bool:
    """Are the type and the static shape of `value` known?"""
    return value.dtype is not None and _sized(value)


def _sized(value: Value) -> bool:
    return value.shape is not None and all(isinstance(size, int | np.integer) for size in value.shape)


def elements(value: Value) -> int:
    """Number of elements; 0 where the shape is not known."""
    return prod(int(size) for size in value.shape) if _sized(value) else 0


def nbytes(value: Value) -> int:
    """Bytes of a variable or constant from its type and shape; a constant's values are not read."""
    return elements(value) * element_type(value).itemsize


def element_type(value: Value) -> np.dtype[Any]:
    """The numpy type of a value; for types that numpy does not have itself, graphsurgeon holds ONNX's number."""
    kind = value.dtype
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind) if isinstance(kind, int) else kind)
