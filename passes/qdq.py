"""Quantize the inputs of the planned linears with one bin's parameters.

Legend: M rows, K input channels, N output channels; scale, z: of this bin; s_w[N]: of the weight.

    Gemm(x[M, K], DequantizeLinear(q_w, s_w), b[N])
      ->  Gemm(x̂, DequantizeLinear(q_w, s_w), DequantizeLinear(q_b, scale·s_w))
    MatMul(x[..., K], DequantizeLinear(q_w, s_w))
      ->  MatMul(x̂, DequantizeLinear(q_w, s_w))
    with x̂ = DequantizeLinear(QuantizeLinear(x)) in integers or float8, or DequantizeLinear(QuantizeLinear(Clip(x)))

It costs what rounding x to the plan's grid costs. q_b = round(b / (scale·s_w)) in int32 (zeros where the linear has no
bias) is the accumulator's own grid: that lets a runtime run the three as one integer kernel with float output. Clip to
[scale·(qmin − z), scale·(qmax − z)] where the grid has fewer levels than its type: its bounds are levels, so rounding
after it is rounding and then clipping to qmin … qmax, exactly. Two precisions that a schedule switches between both
have the Clip, so that they differ in numbers only and share a session. Linears that read one value with one range share
all this. Bins differ in these small constants only, whose names and shapes are the same in every bin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import made_by
from vdq_export.passes import _quantizers
from vdq_export.plan import WIDEST, LayerPlan, bounds

NAME = "qdq"
AFTER = ("quantize_weights",)


class _Quantizer(NamedTuple):
    """One bin's quantizer of one value; clipped: with a Clip in front."""

    scale: float
    zero_point: int
    dtype: str
    bits: int
    clipped: bool

    @property
    def bounds(self) -> tuple[np.float32, np.float32]:
        low, high = bounds(self.dtype, self.bits)
        scale = np.float32(self.scale)
        return scale * np.float32(low - self.zero_point), scale * np.float32(high - self.zero_point)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    plan = context.plan
    if plan is None or context.bin is None:
        return report
    if plan.values:
        report.details.append("every operator is quantized: see qdq_values")
        return report
    place = plan.place(context.bin)
    weights = {node.name: node for node in graph.nodes if node.op == "DequantizeLinear"}
    shared: dict[tuple[int, _Quantizer], Value] = {}
    for layer in plan.layers:
        if not layer.activation:
            continue
        weight = weights.get(f"{layer.name}/Weight")
        if weight is None:
            raise PlanError(f"no quantized weight for {layer.name}", hint="run quantize_weights first")
        node = weight.outputs[0].outputs[0]
        if made_by(node.inputs[0], "DequantizeLinear"):
            continue
        quantizer = _quantizer(layer, place, switched=plan.recipe.schedule.delta is not None)
        key = (id(node.inputs[0]), quantizer)
        if key not in shared:
            shared[key] = _round_trip(graph, node.inputs[0], quantizer)
        node.inputs[0] = shared[key]
        if node.op == "Gemm":
            _quantize_bias(graph, node, layer, np.float32(quantizer.scale))
        report.did(layer.name)
    graph.cleanup()
    return report


def _quantizer(layer: LayerPlan, place: int, switched: bool) -> _Quantizer:
    chosen, dtype = layer.activation[place], layer.activation_dtype
    narrow = bounds(dtype, layer.activation_bits) != bounds(dtype, WIDEST)
    return _Quantizer(chosen.scale, chosen.zero_point, dtype, layer.activation_bits, narrow or switched)


def _round_trip(graph: Graph, value: Value, quantizer: _Quantizer) -> Value:
    """DequantizeLinear(QuantizeLinear(value)), per tensor."""
    base, shape = value.name.removesuffix("/Rows"), list(value.shape)
    if quantizer.clipped:
        ends = zip(("lowest", "highest"), quantizer.bounds, strict=True)
        limits = [graph.constant(graph.fresh(f"{base}.{name}"), np.array(bound)) for name, bound in ends]
        name = graph.fresh(f"{base}/Clip")
        value = graph.add_node("Clip", [value, *limits], name, dtype=np.float32, shape=shape)
    return _quantizers.round_trip(
        graph, value, _quantizers.Quantizer(quantizer.scale, quantizer.zero_point, quantizer.dtype), base
    )


def _quantize_bias(graph: Graph, gemm: Node, layer: LayerPlan, scale: np.float32) -> None:
    """The Gemm's bias, or zeros, as int32 on the accumulator's grid."""
    weight_scale = gemm.inputs[1].inputs[0].inputs[1].values
    bias = gemm.inputs[2].values if len(gemm.inputs) > 2 else np.zeros(layer.shape[1], np.float32)
    grid = (scale * weight_scale).astype(np.float32)
    path = layer.name
    operands = [
        graph.constant(f"{path}.bias.int32", _quantizers.to_int32(bias, grid, f"layer {path}")),
        graph.constant(f"{path}.bias.scale", grid),
    ]
    name, shape = graph.fresh(f"{path}/Bias"), [layer.shape[1]]
    restored = graph.add_node("DequantizeLinear", operands, name, dtype=np.float32, shape=shape, attrs={"axis": 0})
    if len(gemm.inputs) > 2:
        gemm.inputs[2] = restored
    else:
        gemm.inputs.append(restored)
