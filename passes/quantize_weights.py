"""Store the planned linears' weights as integers, one scale an output channel; activations stay float.

Legend: rows M = product of x's leading dimensions, K input channels, N output channels.

    Add(MatMul(x[..., K], W[K, N]), b[N])
      ->  Reshape(Gemm(Reshape(x, [M, K]), DequantizeLinear(q[K, N], scale[N], axis=1), b), [..., N])

q = clip(round(W / scale), -qmax, qmax), as the plan says. It costs what rounding costs; everything else is exact.
Gemm, because its int32 bias is what onnxruntime's integer kernel with float output (QGemm) asks for; the Reshape of a
value that several linears read is made once. Runs once for all bins, so that their graphs hold the same arrays. One
layer at a time, in chunks: beside the integers, memory for a few MB of floats.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Linear, Value, release
from vdq_export.plan import LayerPlan, WeightPlan

NAME = "quantize_weights"
AFTER = ("linear",)
_CHUNK = 1 << 19  # weights converted at a time: the intermediate floats stay in cache


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    if context.plan is None:
        return report
    linears = {linear.name: linear for linear in graph.linears()}
    done = {node.name for node in graph.nodes if node.op == "Gemm"}
    flat: dict[int, Value] = {}
    for layer in context.plan.layers:
        if not layer.quantized:
            report.details.append(f"{layer.name} stays float: {layer.keep_float}")
        elif layer.name in linears:
            _rewrite(graph, linears[layer.name], layer, flat)
            report.did(layer.name)
        elif f"{layer.name}/Gemm" not in done:
            raise PlanError(f"the plan quantizes {layer.name}, which the graph does not have")
    graph.cleanup()
    return report


def _rewrite(graph: Graph, linear: Linear, layer: LayerPlan, flat: dict[int, Value]) -> None:
    assert layer.weight is not None
    if linear.shape != layer.shape:
        raise PlanError(f"layer {layer.name} is {linear.shape} in the graph, {layer.shape} in the plan")
    (k, n), rows, path = linear.shape, linear.rows, linear.name
    # Not linear.value: the linear before this one may have been rewritten since, and its output with it.
    value, output = linear.matmul.inputs[0], linear.output
    if id(value) not in flat:
        flat[id(value)] = value if len(value.shape) == 2 else _reshape(graph, value, [rows, k], f"{value.name}/Rows")
    q = graph.constant(f"{path}.weight.{layer.weight.dtype}", quantize(linear.read_weight(), layer.weight))
    scale = graph.constant(f"{path}.weight.scale", np.array(layer.weight.scale, np.float32))
    # Zeros, but spelled out: onnxruntime fuses no integer kernel around a DequantizeLinear without a zero point.
    zero = graph.constant(f"{path}.weight.zero_point", np.zeros(n, q.dtype))
    name = graph.fresh(f"{path}/Weight")
    weight = graph.add_node(
        "DequantizeLinear", [q, scale, zero], name, dtype=np.float32, shape=[k, n], attrs={"axis": 1}
    )
    operands = [flat[id(value)], weight, *([linear.bias] if linear.bias is not None else [])]
    result = graph.add_node("Gemm", operands, f"{path}/Gemm", dtype=np.float32, shape=[rows, n])
    if len(output.shape) != 2:
        result = _reshape(graph, result, list(output.shape), f"{path}/Unrows")
    last = linear.add or linear.matmul
    last.outputs.clear()
    graph.replace_uses(output, result)
    if not any(output is o or result is o for o in graph.gs.outputs):
        result.name, output.name = output.name, f"{output.name}/float"  # readers outside find it by this name


def _reshape(graph: Graph, value: Value, shape: list[int], name: str) -> Value:
    target = graph.constant(graph.fresh(f"{name}.shape"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], graph.fresh(name), dtype=np.float32, shape=shape)


def quantize(weight: Array, plan: WeightPlan) -> Array:
    """q[K, N] of weight[K, N], in chunks along the axis in which the weight lies in memory."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, plan.dtype.upper()))
    scale = np.array(plan.scale, np.float32)
    q = np.empty(weight.shape, dtype)
    by_column = weight.flags.f_contiguous and not weight.flags.c_contiguous
    across, along = weight.shape if by_column else weight.shape[::-1]
    step = max(1, _CHUNK // across)
    for start in range(0, along, step):
        part = (slice(None), slice(start, start + step)) if by_column else (slice(start, start + step), slice(None))
        chunk = weight[part].T / scale[start : start + step, None] if by_column else weight[part] / scale
        np.rint(chunk, out=chunk)
        np.clip(chunk, -plan.qmax, plan.qmax, out=chunk)
        q[part] = chunk.T.astype(dtype) if by_column else chunk.astype(dtype)
    release(weight)
    return q
