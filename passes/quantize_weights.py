"""Store the planned linears' weights as integers; activations stay float.

Legend: rows M = product of x's leading dimensions, K input channels, N output channels, g channels of a group.

Where the target multiplies (activation type, weight type) in one kernel:
    Add(MatMul(x[..., K], W[K, N]), b[N])
      ->  Reshape(Gemm(Reshape(x, [M, K]), DequantizeLinear(q[K, N], scale[N], axis=1), b), [..., N])
elsewhere, and for groups and MXFP4, whose scales no such kernel takes:
      ->  Add(MatMul(x, DequantizeLinear(q[K, N], scale[N], axis=1)), b)
      ->  Add(MatMul(x, DequantizeLinear(q[K, N], scale[K / g, N], axis=0, block_size=g)), b)
and for NVFP4 and MXFP8 what _block_scaled writes.

q is what the plan's tensors hold, or the nearest level of the plan's grid. It costs what rounding costs; everything
else is exact. Gemm, because its int32 bias is what onnxruntime's integer kernel with float output (QGemm) asks for; the
Reshape of a value that several linears read is made once. MatMul gets a bias of zeros where it has none (not on targets
that quantize every operator: they are for other runtimes): onnxruntime then runs it in float, where it would take a
MatMul alone for an integer one, block scales or not, and fail.
The integers are a promise, computed when they are written and read from there afterwards. Runs once for all bins, so
that their graphs hold the same promises.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Linear, Value
from vdq_export.passes import _block_scaled
from vdq_export.passes._block_scaled import Integers
from vdq_export.plan import LayerPlan, WeightPlan, tensor_name
from vdq_export.weights.number_grid import numpy_type, quantize

NAME = "quantize_weights"
AFTER = ("linear",)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    if context.plan is None:
        return report
    linears = {linear.name: linear for linear in graph.linears()}
    done = {node.name for node in graph.nodes}
    flat: dict[int, Value] = {}
    for layer in context.plan.layers:
        if not layer.quantized:
            report.details.append(f"{layer.name} stays float: {layer.keep_float}")
        elif layer.name in linears:
            linear = linears[layer.name]
            weight = _dequantized(graph, linear, layer, context)
            if runs_in_integers(layer, None if context.spec is None else context.spec.integer):
                _to_gemm(graph, linear, weight, flat)
            else:
                _to_matmul(graph, linear, weight, bare=context.spec is not None and context.spec.every_operator)
            report.did(layer.name)
        elif f"{layer.name}/Weight" not in done:
            raise PlanError(f"the plan quantizes {layer.name}, which the graph does not have")
    graph.cleanup()
    return report


def runs_in_integers(layer: LayerPlan, pairs: Sequence[tuple[str, str]] | None) -> bool:
    """Is there a kernel for what the plan gives `layer`? pairs: TargetSpec.integer; None: any pair has one."""
    weight = layer.weight
    if weight is None or weight.group or weight.grid != "int" or not layer.activation:
        return False
    return pairs is None or (layer.activation_dtype, weight.dtype) in pairs


def _dequantized(graph: Graph, linear: Linear, layer: LayerPlan, context: PassContext) -> Value:
    """DequantizeLinear over the integers and scales of one weight."""
    plan, path = layer.weight, linear.name
    assert plan is not None
    if linear.shape != layer.shape:
        raise PlanError(f"layer {path} is {linear.shape} in the graph, {layer.shape} in the plan")
    k, n = layer.shape
    found = _tensor(context, path, "scale", (k // plan.group, n)) if plan.group else np.array(plan.scale)
    scale = found.astype(np.float32)
    source, integers = _integers(linear, plan, scale, context)
    if _block_scaled.is_block_scaled(plan):
        return _block_scaled.weight(graph, path, plan, (source, integers), scale)
    dtype = numpy_type(plan.dtype)
    q = graph.derived(f"{path}.weight.{plan.dtype}", source, integers, dtype=dtype)
    operands = [q, graph.constant(f"{path}.weight.scale", scale)]
    attrs = {"axis": 0, "block_size": plan.group} if plan.group else {"axis": 1}
    if not plan.group:
        # Zeros, but spelled out: onnxruntime fuses no integer kernel around a DequantizeLinear without a zero point.
        operands.append(graph.constant(f"{path}.weight.zero_point", np.zeros(n, dtype)))
    name = graph.fresh(f"{path}/Weight")
    return graph.add_node("DequantizeLinear", operands, name, dtype=np.float32, shape=[k, n], attrs=attrs)


def _integers(linear: Linear, plan: WeightPlan, scale: Array, context: PassContext) -> Integers:
    if not plan.codes:
        return linear.weight, lambda weight: quantize(weight, scale, plan.qmax, plan.grid, plan.dtype)
    codes = _tensor(context, linear.name, "codes", linear.shape)
    largest = np.abs(codes.astype(np.float32)).max(initial=0)
    if largest > plan.qmax:
        raise PlanError(f"layer {linear.name}: a weight of {largest:g} outside its grid of ±{plan.qmax}")
    return codes, lambda found: found


def _tensor(context: PassContext, layer: str, what: str, shape: tuple[int, int]) -> Array:
    found = context.tensors.get(tensor_name(layer, what))  # type: ignore[arg-type]  # one of its literals, see callers
    if found is None or found.shape != shape:
        got = "has none" if found is None else f"has {found.shape}"
        raise PlanError(
            f"layer {layer} needs {what} of shape {shape}, the plan {got}", hint="plan.safetensors is missing"
        )
    return found


def _to_matmul(graph: Graph, linear: Linear, weight: Value, *, bare: bool) -> None:
    linear.matmul.inputs[1] = weight
    if linear.bias is None and not bare:
        output, path = linear.matmul.outputs[0], linear.name
        zeros = graph.constant(f"{path}.bias.zeros", np.zeros(linear.shape[1], np.float32))
        name = graph.fresh(f"{path}/Add")
        biased = graph.add_node("Add", [output, zeros], name, dtype=np.float32, shape=output.shape)
        graph.replace_uses(output, biased, keep=biased.inputs)
        _hand_name_over(graph, output, biased)


def _to_gemm(graph: Graph, linear: Linear, weight: Value, flat: dict[int, Value]) -> None:
    (k, n), rows, path = linear.shape, linear.rows, linear.name
    # Not linear.value: the linear before this one may have been rewritten since, and its output with it.
    value, output = linear.matmul.inputs[0], linear.output
    if id(value) not in flat:
        flat[id(value)] = value if len(value.shape) == 2 else _reshape(graph, value, [rows, k], f"{value.name}/Rows")
    operands = [flat[id(value)], weight, *([linear.bias] if linear.bias is not None else [])]
    result = graph.add_node("Gemm", operands, f"{path}/Gemm", dtype=np.float32, shape=[rows, n])
    if len(output.shape) != 2:
        result = _reshape(graph, result, list(output.shape), f"{path}/Unrows")
    last = linear.add or linear.matmul
    last.outputs.clear()
    graph.replace_uses(output, result)
    _hand_name_over(graph, output, result)


def _hand_name_over(graph: Graph, output: Value, result: Value) -> None:
    """Readers outside find the layer's output by its name."""
    if not any(output is o or result is o for o in graph.gs.outputs):
        result.name, output.name = output.name, f"{output.name}/float"


def _reshape(graph: Graph, value: Value, shape: list[int], name: str) -> Value:
    target = graph.constant(graph.fresh(f"{name}.shape"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], graph.fresh(name), dtype=np.float32, shape=shape)
