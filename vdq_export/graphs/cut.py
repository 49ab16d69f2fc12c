"""Cuts a QDQ graph into its operators: for running a stretch of them alone.

An *operator* is any node but QuantizeLinear and DequantizeLinear; these belong to the values around it. A *value* is
what an operator (or a graph input) gives, in float; it is *settled* behind its quantizer, in DequantizeLinear's output:

    value v --QuantizeLinear--> codes --DequantizeLinear--> v settled --[a reader's own Q/DQ pair]--> operator
    constant ----------------------------DequantizeLinear--> operator

A cut goes through values in front of their quantizers, so that every operator keeps the types it had on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vdq_export.errors import PassError
from vdq_export.graph import Array, Constant, Graph, Node, Value, is_constant

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Encoding:
    """A quantizer as it stands in the graph: scale and zero_point are 0-d per tensor, [C] along `axis` per channel."""

    codes: str  # name of the integer tensor
    dtype: str
    scale: Array
    zero_point: Array
    axis: int | None = None


@dataclass(frozen=True)
class Part:
    """Some operators of a graph as a graph of its own. inputs: the values cut; outputs: settled values."""

    graph: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def operators(graph: Graph) -> list[Node]:
    """The operators of `graph`, in its order."""
    return [node for node in graph.gs.nodes if node.op not in (QUANTIZE, DEQUANTIZE)]


def source(tensor: Value) -> Value:
    """The value (or constant) that `tensor` carries, in front of every Q/DQ pair."""
    while tensor.inputs and tensor.inputs[0].op in (QUANTIZE, DEQUANTIZE):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def settled(value: Value) -> list[Value]:
    """What readers of `value` begin with: the DequantizeLinear outputs right behind it, or the value itself.

    The value itself is among them when an operator or a graph output takes it unquantized.
    """
    found = [dq.outputs[0] for q in value.outputs if q.op == QUANTIZE for dq in q.outputs[0].outputs]
    plain = not found or any(node.op != QUANTIZE for node in value.outputs)
    return [*found, value] if plain else found


def on_grid(value: Value) -> Value:
    """The settled value that stands for `value` where that is one and the same for all readers, else `value`.

    Fed in place of `value` it is quantized to the same codes whatever way the quantizer rounds.
    """
    found = settled(value)
    return found[0] if len(found) == 1 else value


def read_values(operator: Node) -> list[Value]:
    """The values an operator reads, without constants and without repeats."""
    found: dict[str, Value] = {}
    for tensor in operator.inputs:
        origin = source(tensor)
        if tensor.name and not is_constant(origin):
            found[origin.name] = origin
    return list(found.values())


def quantizer(tensor: Value) -> Encoding | None:
    """The quantizer whose DequantizeLinear gives `tensor`; None for a float value."""
    if not tensor.inputs or tensor.inputs[0].op != DEQUANTIZE:
        return None
    return encoding(tensor.inputs[0])


def encoding(node: Node) -> Encoding:
    """The quantizer of a Q or DQ node with constant parameters. Raises PassError for computed ones."""
    codes = node.outputs[0] if node.op == QUANTIZE else node.inputs[0]
    scale = node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    if not is_constant(scale) or (zero is not None and not is_constant(zero)):
        raise PassError(f"the parameters of {node.name} are computed, not constant")
    dtype = zero.values.dtype if zero is not None else _dtype(codes)
    zeros = zero.values if zero is not None else np.zeros_like(scale.values, np.int32)
    if scale.values.size == 1:
        return Encoding(str(codes.name), np.dtype(dtype).name, scale.values.reshape(()), zeros.reshape(()))
    return Encoding(str(codes.name), np.dtype(dtype).name, scale.values, zeros, int(node.attrs.get("axis", 1)))


def encodings(graph: Graph) -> Iterator[Encoding]:
    """Every quantizer of `graph`, once for each integer tensor."""
    seen: set[str] = set()
    for node in graph.gs.nodes:
        if node.op in (QUANTIZE, DEQUANTIZE):
            found = encoding(node)
            if found.codes not in seen:
                seen.add(found.codes)
                yield found


def part(graph: Graph, chosen: Sequence[str], like: Mapping[str, Array]) -> Part:
    """The operators named in `chosen` alone.

    like: an array for every value of `graph` and every settled one, for the types and shapes at the cuts.
    Graph inputs keep their names; a value cut becomes an input of its own name. Raises PassError for unknown names.
    """
    wanted = set(chosen)
    cut = graph.copy()
    inside = [node for node in operators(cut) if node.name in wanted]
    if len(inside) != len(wanted):
        raise PassError(f"no such operators: {', '.join(sorted(wanted - {node.name for node in inside}))}")
    members = {id(node) for node in inside}
    inputs: dict[str, Value] = {}
    for node in inside:
        for value in read_values(node):
            if not any(id(maker) in members for maker in value.inputs):
                inputs[value.name] = value
    finals = {id(value) for value in cut.gs.outputs}
    outputs = [one for node in inside for value in node.outputs for one in _leaving(value, members, finals)]
    for value in inputs.values():
        value.inputs.clear()
    for value in [*inputs.values(), *outputs]:
        value.dtype, value.shape = like[value.name].dtype, list(like[value.name].shape)
    cut.gs.inputs, cut.gs.outputs = list(inputs.values()), outputs
    cut.gs.name = f"part of {graph.gs.name}"
    cut.cleanup()
    return Part(cut, tuple(inputs), tuple(str(one.name) for one in outputs))


def _leaving(value: Value, members: set[int], finals: set[int]) -> list[Value]:
    """The settled forms of `value` that something outside of `members` reads, and itself where it is an output."""
    found = {id(one): one for one in (settled(value) if id(value) not in finals else [*settled(value), value])}
    return [one for key, one in found.items() if key in finals or _read_outside(one, members, finals)]


def _read_outside(tensor: Value, members: set[int], finals: set[int]) -> bool:
    for reader in tensor.outputs:
        if reader.op in (QUANTIZE, DEQUANTIZE):
            if any(id(one) in finals or _read_outside(one, members, finals) for one in reader.outputs):
                return True
        elif id(reader) not in members:
            return True
    return False


def unquantized(graph: Graph) -> Graph:
    """A copy in which no value is rounded: readers take it in front of its quantizers. Constants keep their codes."""
    made = graph.copy()
    for node in made.nodes:
        if node.op == DEQUANTIZE and not is_constant(source(node.outputs[0])):
            value, dq = source(node.outputs[0]), node.outputs[0]
            for reader in list(dq.outputs):
                for index, tensor in enumerate(reader.inputs):
                    if tensor is dq:
                        reader.inputs[index] = value
    made.gs.outputs = [source(one) for one in made.gs.outputs]
    made.cleanup()
    return made


def _dtype(codes: Constant) -> Any:
    if codes.dtype is None:
        raise PassError(f"{codes.name} has no known type")
    return codes.dtype
