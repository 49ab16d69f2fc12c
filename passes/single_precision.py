"""What is computed in doubles between two casts, in single precision.

    Cast(f(Cast(x, to double), k…), to float)  ->  f(x, k'…)                                            k' = float32(k)

f: sums, products and layout changes, with double constants k: rotary embeddings that diffusers computes so. Left alone,
with the reason: doubles that go through anything else (Sin of a large angle needs its digits), that are an input or
output, or that other types than float32 are made of.

Exact to float32 rounding: operands were float32 and the result becomes float32; what is lost are the roundings in
between, 6e-8 of a term each. No NPU computes in doubles, and a CPU does half as many at a time.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.graphs.match import readers

NAME = "single_precision"
AFTER = ("fold_constants", "no_ops")
_LINEAR = ("Add", "Sub", "Mul", "Neg", "Identity")
_LAYOUT = ("Reshape", "Transpose", "Concat", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    ends = {id(value) for value in [*graph.gs.inputs, *graph.gs.outputs]}
    made: dict[int, Value] = {}
    for region in _regions(graph):
        reason = next((why for node in region if (why := _in_the_way(node, ends))), "")
        if reason:
            report.skip(region[0].name, reason)
            continue
        for node in region:
            _narrow(graph, node, made)
        report.did(region[0].name)
    graph.cleanup()
    return report


def _is_double(value: Value) -> bool:
    return not isinstance(value.dtype, int) and value.dtype is not None and np.dtype(value.dtype) == np.float64


def _regions(graph: Graph) -> list[list[Node]]:
    """Nodes with doubles, together with those they are linked to by computed doubles; each in graph order."""
    nodes = [n for n in graph.nodes if any(_is_double(v) for v in [*n.inputs, *n.outputs])]
    number: dict[int, int] = {}
    for node in nodes:
        if id(node) in number:
            continue
        stack, mine = [node], len(number)
        while stack:
            one = stack.pop()
            if id(one) in number:
                continue
            number[id(one)] = mine
            for value in [*one.inputs, *one.outputs]:
                if _is_double(value) and not is_constant(value):
                    stack += [*value.inputs, *readers(value)]
    found: dict[int, list[Node]] = {}
    for node in nodes:
        found.setdefault(number[id(node)], []).append(node)
    return list(found.values())


def _in_the_way(node: Node, ends: set[int]) -> str:
    """Why `node` must keep its doubles, or nothing."""
    doubles = [v for v in [*node.inputs, *node.outputs] if _is_double(v)]
    if any(id(v) in ends for v in doubles):
        return f"{node.name} reads or makes a double of the graph's interface"
    if node.op == "Cast":
        other = node.inputs[0] if _is_double(node.outputs[0]) else node.outputs[0]
        single = not isinstance(other.dtype, int) and other.dtype is not None and np.dtype(other.dtype) == np.float32
        return "" if single else f"{node.name} is between double and another type than float32"
    return "" if node.op in (*_LINEAR, *_LAYOUT) else f"{node.op} {node.name} may need the digits"


def _narrow(graph: Graph, node: Node, made: dict[int, Value]) -> None:
    """`node` in float32; `made` holds the constants that there are already."""
    if node.op == "Cast":
        node.attrs["to"] = int(onnx.TensorProto.FLOAT)
        if _is_double(node.outputs[0]):
            node.outputs[0].dtype = np.dtype(np.float32)
        graph.replace_uses(node.outputs[0], node.inputs[0])
        node.outputs.clear()
        return
    for index, value in enumerate(node.inputs):
        if is_constant(value) and _is_double(value):
            if id(value) not in made:
                name = graph.fresh(f"{value.name}.single")
                made[id(value)] = graph.derived(name, value, np.asarray, dtype=np.float32)
            node.inputs[index] = made[id(value)]
    for value in node.outputs:
        if _is_double(value):
            value.dtype = np.dtype(np.float32)
