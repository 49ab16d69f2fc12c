"""Quantize the inputs of the planned linears with one bin's parameters.

Legend: M rows, K input channels, N output channels; scale, zero_point: of this bin; s_w[N]: of the weight.

    Gemm(x[M, K], DequantizeLinear(q_w, s_w), b[N])
      ->  Gemm(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(q_w, s_w), DequantizeLinear(q_b, scale·s_w))

It costs what rounding x to the plan's grid costs. q_b = round(b / (scale·s_w)) in int32 (zeros where the linear has no
bias) is the accumulator's own grid: that lets a runtime run the three as one integer kernel with float output. Linears
that read one value with one range share its QuantizeLinear and DequantizeLinear. Bins differ in these small constants
only, whose names and shapes are the same in every bin.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Node, Value
from vdq_export.match import made_by
from vdq_export.plan import LayerPlan, Range

NAME = "qdq"
AFTER = ("quantize_weights",)
_INT32 = 2**31 - 1


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    if context.plan is None or context.bin is None:
        return report
    gemms = {node.name: node for node in graph.nodes if node.op == "Gemm"}
    shared: dict[tuple[int, float, int, str], Value] = {}
    for layer in context.plan.layers:
        if not layer.quantized:
            continue
        gemm = gemms.get(f"{layer.name}/Gemm")
        if gemm is None:
            raise PlanError(f"no quantized weight for {layer.name}", hint="run quantize_weights first")
        if made_by(gemm.inputs[0], "DequantizeLinear"):
            continue
        _apply(graph, gemm, layer, layer.activation[context.bin.index], shared)
        report.did(layer.name)
    graph.cleanup()
    return report


def _apply(
    graph: Graph, gemm: Node, layer: LayerPlan, chosen: Range, shared: dict[tuple[int, float, int, str], Value]
) -> None:
    value = gemm.inputs[0]
    scale = np.float32(chosen.scale)
    key = (id(value), float(scale), chosen.zero_point, layer.activation_dtype)
    if key not in shared:
        shared[key] = _round_trip(graph, value, scale, chosen.zero_point, layer.activation_dtype)
    gemm.inputs[0] = shared[key]
    weight_scale = gemm.inputs[1].inputs[0].inputs[1].values
    bias = gemm.inputs[2].values if len(gemm.inputs) > 2 else np.zeros(layer.shape[1], np.float32)
    grid = (scale * weight_scale).astype(np.float32)
    path = layer.name
    operands = [
        graph.constant(f"{path}.bias.int32", _to_int32(bias, grid, path)),
        graph.constant(f"{path}.bias.scale", grid),
    ]
    name, shape = graph.fresh(f"{path}/Bias"), [layer.shape[1]]
    restored = graph.add_node("DequantizeLinear", operands, name, dtype=np.float32, shape=shape, attrs={"axis": 0})
    if len(gemm.inputs) > 2:
        gemm.inputs[2] = restored
    else:
        gemm.inputs.append(restored)


def _round_trip(graph: Graph, value: Value, scale: np.float32, zero_point: int, dtype: str) -> Value:
    """DequantizeLinear(QuantizeLinear(value)), per tensor."""
    integer = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, dtype.upper()))
    base = value.name.removesuffix("/Rows")
    parameters = [
        graph.constant(graph.fresh(f"{base}.scale"), np.array(scale, np.float32)),
        graph.constant(graph.fresh(f"{base}.zero_point"), np.array(zero_point, integer)),
    ]
    shape = list(value.shape)
    names = graph.fresh(f"{base}/Quantize"), graph.fresh(f"{base}/Dequantize")
    q = graph.add_node("QuantizeLinear", [value, *parameters], names[0], dtype=integer, shape=shape)
    return graph.add_node("DequantizeLinear", [q, *parameters], names[1], dtype=np.float32, shape=shape)


def _to_int32(bias: Array, grid: Array, layer: str) -> Array:
    q = np.rint(bias.astype(np.float64) / grid)
    if np.abs(q).max(initial=0.0) > _INT32:
        raise PlanError(f"layer {layer}: its bias does not fit 32 bits", hint="its input range is far too small for it")
    return q.astype(np.int32)
