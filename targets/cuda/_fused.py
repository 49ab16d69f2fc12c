"""Nodes of the domain vdq.cuda, by the names that ops.py gives their operands and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vdq_export.graph import Graph, Node, Value, absent
from vdq_export.graphs.match import readers
from vdq_export.targets.cuda.ops import DOMAIN, INPUTS, OUTPUTS


def is_fused(node: Node, *ops: str) -> bool:
    return node.domain == DOMAIN and node.op in ops


def fused_by(value: Value, *ops: str) -> Node | None:
    """The fused node that computes `value`, when its op is one of `ops`."""
    node = value.inputs[0] if value.inputs else None
    return node if node is not None and is_fused(node, *ops) else None


def operand(node: Node, name: str) -> Value | None:
    index = INPUTS[node.op].index(name)
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def result(node: Node, name: str) -> Value | None:
    index = OUTPUTS[node.op].index(name)
    return node.outputs[index] if index < len(node.outputs) and node.outputs[index].name else None


def held(node: Node, name: str) -> Value:
    """An operand or a result that the node has."""
    found = operand(node, name) if name in INPUTS[node.op] else result(node, name)
    assert found is not None, f"{node.name} has no {name}"
    return found


def put(node: Node, **operands: Value | None) -> None:
    """Give the node operands; None takes one away."""
    for name, value in operands.items():
        _place(node.inputs, INPUTS[node.op].index(name), value)


def put_result(node: Node, name: str, value: Value | None) -> None:
    _place(node.outputs, OUTPUTS[node.op].index(name), value)


def _place(values: Any, index: int, value: Value | None) -> None:
    """A node's list of values has absent ones between those it has, and none behind."""
    while len(values) <= index:
        values.append(absent())
    values[index] = absent() if value is None else value
    while values and not values[-1].name:
        del values[-1]


def add(
    graph: Graph,
    op: str,
    name: str,
    operands: Mapping[str, Value | None],
    results: Mapping[str, Value | tuple[Any, Sequence[int]]],
    attrs: Mapping[str, Any] | None = None,
) -> Node:
    """Append a fused node. results: of those it has, a value that no node makes now, or (type, shape) of a new one."""
    inputs = [value if (value := operands.get(one)) is not None else absent() for one in INPUTS[op]]
    new = {one: described for one, described in results.items() if isinstance(described, tuple)}
    more = [(f"/{one}", *described) for one, described in new.items()]
    made = graph.add_node(op, inputs, name, dtype=None, shape=None, attrs=attrs, domain=DOMAIN, more=more)
    node = made.inputs[0]
    values = dict(zip(new, list(node.outputs)[1:], strict=True))
    node.outputs.clear()
    for one, described in results.items():
        put_result(node, one, values.get(one, described))
    while not node.inputs[-1].name:
        del node.inputs[-1]
    return node


def absorb(node: Node, reader: Node) -> None:
    """Let `reader` go, and `node` compute in its place what it computed from the node's y."""
    made = reader.outputs[0]
    remove(reader)
    put_result(node, "y", made)


def remove(*nodes: Node) -> None:
    """Take nodes out; the next cleanup drops them."""
    for node in nodes:
        node.inputs.clear()
        node.outputs.clear()


def next_node(graph: Graph, value: Value, *ops: str) -> Node | None:
    """The only node that reads `value` (any number of times), when its op is one of `ops` and no output is `value`."""
    found = readers(value)
    inside = all(value is not output for output in graph.gs.outputs)
    return found[0] if inside and len(found) == 1 and found[0].op in ops else None


def is_output(graph: Graph, value: Value) -> bool:
    return any(value is output for output in graph.gs.outputs)
