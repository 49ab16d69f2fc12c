"""Masks computed in floats instead of booleans and integers.

Legend: m, n masks (0 or 1); i, j integers; a, b scalars. What decides a Where becomes arithmetic, from the inputs on:

    Where(m, a, b)                ->  Add(Mul(m', a - b), b)              Cast(m, to float)  ->  m'
    And(m, n), Or(m, n), Not(m)   ->  Mul(m', n'), Max(m', n'), Sub(1, m')
    i >= j, i > j                 ->  Clip(2·(i' - j') + 1.5, 0, 1), Clip(2·(i' - j') - 0.5, 0, 1); <=, < the other way
    i == j, Cast(i, to bool)      ->  Clip(1.5 - 2·|i' - j'|, 0, 1), Clip(i', 0, 1)
    m[..., k] = True              ->  Max(m', K)                          K constant: 1 where it is assigned
    Pad(m, constant)              ->  Concat(C, m', C)                    C constant

and sums and layout changes of integers or booleans the same of floats. Exact for integers below 2^23 (in Cast: not
below zero); comparisons keep half a unit of distance, so that rounding to 16 bits does not decide them. Hexagon's
compiler refuses ScatterElements and high-rank Expand of booleans.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.graphs.match import scalar

NAME = "float_masks"
AFTER = ("mask_bias",)  # which makes the chosen numbers finite
_SAME = ("Add", "Sub", "Mul", "ReduceSum", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Tile", "Transpose", "Slice",
         "Concat", "Gather")  # fmt: skip
_MARGIN = {"GreaterOrEqual": 1.5, "LessOrEqual": 1.5, "Greater": -0.5, "Less": -0.5}


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    masks = _Masks(graph)
    for node in graph.nodes:
        to_float = node.op == "Cast" and node.inputs[0].dtype == np.bool_ and node.outputs[0].dtype == np.float32
        numbers = [scalar(t) for t in node.inputs[1:]] if node.op == "Where" else []
        if not to_float and (len(numbers) != 2 or None in numbers):
            continue
        made = masks.of(node.inputs[0])
        if isinstance(made, str):
            report.skip(node.name, made)
            continue
        if not to_float:
            chosen, other = (float(number) for number in numbers if number is not None)
            if not np.isfinite(chosen - other):
                report.skip(node.name, "it chooses a number that is not finite")
                continue
            made = masks.scaled(made, chosen - other, other, node)
        graph.replace_uses(node.outputs[0], made)
        report.did(node.name)
    graph.cleanup()
    return report


class _Masks:
    """Float counterparts of integer and boolean values, each made once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: dict[str, Value | str] = {}

    def of(self, value: Value) -> Value | str:
        """The counterpart of `value`, or why there is none."""
        if value.name not in self._made:
            self._made[value.name] = self._make(value)
        return self._made[value.name]

    def scaled(self, value: Value, factor: float, summand: float, node: Node) -> Value:
        """value · factor + summand"""
        product = self._node("Mul", [value, self._number(factor, node)], node, value.shape)
        return self._node("Add", [product, self._number(summand, node)], node, value.shape)

    def _make(self, value: Value) -> Value | str:
        if is_constant(value):
            return self._graph.constant(self._graph.fresh(f"{value.name}.float"), value.values.astype(np.float32))
        if not value.inputs:
            attrs = {"to": int(onnx.TensorProto.FLOAT)}
            name = self._graph.fresh(f"{value.name}/Cast")
            return self._graph.add_node("Cast", [value], name, dtype=np.float32, shape=value.shape, attrs=attrs)
        node = value.inputs[0]
        if node.op in ("ScatterElements", "Pad"):
            return self._padded(node) if node.op == "Pad" else self._assigned(node)
        count = {"Concat": len(node.inputs), "Not": 1, "Cast": 1}.get(node.op, 2)
        if node.op in _SAME and node.op not in ("Add", "Sub", "Mul", "Concat"):
            count = 1
        operands = [self.of(operand) for operand in node.inputs[:count]]
        reason = next((one for one in operands if isinstance(one, str)), None)
        return reason or self._computed(node, [one for one in operands if not isinstance(one, str)])

    def _computed(self, node: Node, operands: list[Value]) -> Value | str:
        shape, first = node.outputs[0].shape, operands[0]
        if node.op == "Cast":
            if node.outputs[0].dtype != np.bool_ or node.inputs[0].dtype == np.bool_:
                return first if node.inputs[0].dtype != np.float32 else f"{node.name} rounds a float"
            return self._clipped(first, node)
        if node.op in _MARGIN:
            left, right = operands if node.op.startswith("Greater") else operands[::-1]
            apart = self._node("Sub", [left, right], node, shape)
            return self._clipped(self.scaled(apart, 2.0, _MARGIN[node.op], node), node)
        if node.op == "Equal":
            apart = self._node("Abs", [self._node("Sub", operands, node, shape)], node, shape)
            return self._clipped(self.scaled(apart, -2.0, 1.5, node), node)
        if node.op == "Not":
            return self._node("Sub", [self._number(1.0, node), first], node, shape)
        op = {"And": "Mul", "Or": "Max"}.get(node.op, node.op if node.op in _SAME else "")
        if not op:
            return f"{node.op} {node.name} has no form in floats"
        return self._node(op, [*operands, *node.inputs[len(operands) :]], node, shape, dict(node.attrs))

    def _assigned(self, node: Node) -> Value | str:
        data, indices, updates = node.inputs
        if not (is_constant(indices) and is_constant(updates)) or not np.all(updates.values):
            return f"{node.name} assigns something that is not True throughout"
        first, where = self.of(data), np.zeros(data.shape, np.float32)
        np.put_along_axis(where, indices.values, 1.0, node.attrs.get("axis", 0))
        fixed = self._graph.constant(self._graph.fresh(f"{node.name}.assigned"), where)
        return first if isinstance(first, str) else self._node("Max", [first, fixed], node, data.shape)

    def _padded(self, node: Node) -> Value | str:
        given = {place: value for place, value in enumerate(node.inputs) if value.name}
        constant = all(is_constant(given[place]) for place in (1, 2) if place in given)
        if node.attrs.get("mode", "constant") != "constant" or 3 in given or not constant:
            return f"{node.name} does not pad every axis with a constant"
        made, fill = self.of(node.inputs[0]), float(given[2].values) if 2 in given else 0.0
        for axis, sides in enumerate(zip(*np.split(given[1].values, 2), strict=True)):
            for place, count in enumerate(map(int, sides)):
                if isinstance(made, str) or count < 0:
                    return made if isinstance(made, str) else f"{node.name} cuts off"
                made = self._beside(made, axis, count, fill, node, after=place == 1) if count else made
        return made

    def _beside(self, value: Value, axis: int, count: int, fill: float, node: Node, *, after: bool) -> Value:
        shape = [count if index == axis else size for index, size in enumerate(value.shape)]
        block = self._graph.constant(self._graph.fresh(f"{node.name}.fill"), np.full(shape, fill, np.float32))
        shape[axis] += value.shape[axis]
        return self._node("Concat", [value, block] if after else [block, value], node, shape, {"axis": axis})

    def _clipped(self, value: Value, node: Node) -> Value:
        return self._node("Clip", [value, self._number(0.0, node), self._number(1.0, node)], node, value.shape)

    def _number(self, number: float, node: Node) -> Value:
        return self._graph.constant(self._graph.fresh(f"{node.name}.number"), np.array(number, np.float32))

    def _node(self, op: str, inputs: list[Value], like: Node, shape: list[int], attrs: dict | None = None) -> Value:  # type: ignore[type-arg]
        path = like.name.rpartition("/")[0]
        name = self._graph.fresh(f"{path}/{op}".lstrip("/"))
        return self._graph.add_node(op, inputs, name, dtype=np.float32, shape=shape, attrs=attrs)
