"""Quantize every value and constant that the plan names: for targets that leave no operator in float.

Legend: scale, z: of this bin; s_x, s_w: scales of a Conv's input and weight.

    node(x, c)                            c a constant
      ->  node(x̂, DequantizeLinear(q_c, s_c))      x̂ = DequantizeLinear(QuantizeLinear(x))
    reader(x)  that takes another type or range
      ->  reader(DequantizeLinear(QuantizeLinear(x̂)))
    Conv(x, w, b)
      ->  Conv(x̂, DequantizeLinear(q_w, s_w[N]), DequantizeLinear(q_b, s_x·s_w))   q_b = round(b / (s_x·s_w)), int32

It costs what rounding to the plan's grids costs. The pair stands behind whatever makes x, once, so that each operator
lies between dequantized inputs and a quantized output: one integer operator to a compiler. Inputs and outputs of the
graph keep their type; their pairs are inside. Weights of linears are quantized before (quantize_weights).
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.graphs.match import made_by
from vdq_export.passes import _quantizers
from vdq_export.plan import INT_RANGE, ConstantPlan, IntType, QuantPlan, Range, ValuePlan
from vdq_export.weights.number_grid import numpy_type

NAME = "qdq_values"
AFTER = ("quantize_weights", "qdq")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    plan = context.plan
    if plan is None or context.bin is None or not plan.values:
        return report
    values, nodes = graph.values(), {node.name: node for node in graph.nodes}
    place = plan.place(context.bin)
    if not _is_done(plan, values):
        for one in plan.values:
            _quantize_value(graph, _named(values, one.name), one, place, nodes)
            report.did(one.name)
        for constant in plan.constants:
            _quantize_constant(graph, _named(values, constant.name), constant, nodes)
            report.did(constant.name)
    graph.cleanup()
    return report


def _is_done(plan: QuantPlan, values: dict[str, Value]) -> bool:
    return f"{plan.values[0].name}/Dequantize" in values


def _named(values: dict[str, Value], name: str) -> Value:
    if name not in values:
        raise PlanError(f"the plan quantizes {name}, which the graph does not have")
    return values[name]


def _quantize_value(graph: Graph, value: Value, plan: ValuePlan, place: int, nodes: dict[str, Node]) -> None:
    restored = _quantizers.round_trip(graph, value, _quantizer(plan.ranges[place], plan.dtype), plan.name)
    graph.replace_uses(value, restored, keep=restored.inputs[0].inputs[0].inputs)
    for second in plan.conversions:
        base = f"{plan.name}/{second.dtype}"
        converted = _quantizers.round_trip(graph, restored, _quantizer(second.ranges[place], second.dtype), base)
        for reader in second.readers:
            _replace_input(nodes, reader, restored, converted)


def _quantizer(chosen: Range, dtype: IntType) -> _quantizers.Quantizer:
    return _quantizers.Quantizer(chosen.scale, chosen.zero_point, dtype)


def _replace_input(nodes: dict[str, Node], reader: str, old: Value, new: Value) -> None:
    node = nodes.get(reader)
    places = [] if node is None else [i for i, operand in enumerate(node.inputs) if operand is old]
    if node is None or not places:
        raise PlanError(f"the plan says that {reader} reads {old.name}, which it does not")
    for index in places:
        node.inputs[index] = new


def _quantize_constant(graph: Graph, constant: Value, plan: ConstantPlan, nodes: dict[str, Node]) -> None:
    if not is_constant(constant):
        raise PlanError(f"{plan.name} is no constant")
    scale = np.array(plan.scale, np.float32) if plan.scale else _accumulator(plan, nodes)
    axis = 0 if not plan.scale else plan.axis
    if axis is None:
        scale = scale.reshape(())
    operands = [
        graph.constant(graph.fresh(f"{plan.name}.{plan.dtype}"), _integers(constant.values, scale, axis, plan)),
        graph.constant(graph.fresh(f"{plan.name}.scale"), scale),
        graph.constant(graph.fresh(f"{plan.name}.zero_point"), np.full(scale.shape, plan.zero_point, plan.dtype)),
    ]
    restored = graph.add_node(
        "DequantizeLinear", operands, graph.fresh(f"{plan.name}/Constant"), dtype=np.float32,
        shape=list(constant.shape), attrs={} if axis is None else {"axis": axis},
    )  # fmt: skip
    for reader in plan.readers:
        _replace_input(nodes, reader, constant, restored)


def _accumulator(plan: ConstantPlan, nodes: dict[str, Node]) -> Array:
    """Scale of the int32 sums that a bias is added to: that of the input times those of the weight."""
    operator = nodes[plan.readers[0]]
    made = [made_by(operand, "DequantizeLinear") for operand in operator.inputs[:2]]
    if made[0] is None or made[1] is None:
        raise PlanError(f"{plan.name}: input and weight of {operator.name} are not quantized")
    product: Array = (made[0].inputs[1].values * made[1].inputs[1].values).astype(np.float32)
    return product


def _integers(values: Array, scale: Array, axis: int | None, plan: ConstantPlan) -> Array:
    if plan.dtype == "int32":
        return _quantizers.to_int32(values, scale, plan.name)
    low, high = INT_RANGE[plan.dtype]
    shaped = scale if axis is None else scale.reshape([-1 if d == axis else 1 for d in range(values.ndim)])
    q: Array = np.clip(np.rint(values / shaped) + plan.zero_point, low, high)
    return q.astype(numpy_type(plan.dtype))
