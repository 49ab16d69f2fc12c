"""Weights and activations in TensorRT's block-scaled formats, as quantize_weights and dynamic_quantize write them.

Legend: K input channels, N output channels, b channels of a block (NVFP4 16, MXFP8 32).

    NVFP4  W -> Transpose(DequantizeLinear(q[N, K], DequantizeLinear(s[N, K / b], unit), axis=-1, block_size=16))
           x -> DequantizeLinear(q, DequantizeLinear(s, unit), axis=-1, block_size=16)
                with q, s = TRT_FP4DynamicQuantize(x, unit)
    MXFP8  W -> Transpose(TRT_MXFP8DequantizeLinear(q[N, K], s[N, K / b]))
           x -> TRT_MXFP8DequantizeLinear(TRT_MXFP8DynamicQuantize(x))

That is how Model Optimizer 0.47.0 writes them. NVFP4's numbers are stored as float8e4m3fn here, which has them all and
which onnxruntime can read; vdq_export.handoff.trt_functions tells more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx

from vdq_export.graph import Array, Constant, Graph, Value
from vdq_export.handoff.trt_functions import DOMAIN, FP4, MXFP8, MXFP8_DEQUANTIZE, functions
from vdq_export.plan import MX_BLOCK, NVFP4_BLOCK, Dynamic, WeightPlan
from vdq_export.weights.number_grid import numpy_type

# What integers are made of (a float weight, or the integers themselves), and how.
Integers: TypeAlias = tuple[Constant | Array, Callable[[Array], Array]]
BLOCK = {"nvfp4": NVFP4_BLOCK, "mxfp8": MX_BLOCK}
_FLOAT8 = "float8e4m3fn"
_BIAS = 127  # of E8M0


def is_block_scaled(plan: WeightPlan) -> bool:
    """NVFP4 and MXFP8; MXFP4 has no operator of its own."""
    return plan.scales == "e4m3" or (plan.scales == "e8m0" and plan.grid == "e4m3")


def weight(graph: Graph, path: str, plan: WeightPlan, codes: Integers, scale: Array) -> Value:
    """The dequantized weight [K, N] of codes [K, N] and scale [K / b, N], made by a node named `path`/Weight."""
    source, integers = codes
    (k, n), base, dtype = source.shape, f"{path}.weight", numpy_type(plan.dtype)
    if plan.scales == "e4m3":
        # q · scale = (2 · number) · (unit · level) = number · (2 · unit · level); unit has few bits: level is exact.
        def numbers(values: Array) -> Array:
            return (integers(values).T.astype(np.float32) / 2).astype(numpy_type(_FLOAT8))

        levels = (scale.T.astype(np.float64) / plan.unit).astype(np.float32).astype(numpy_type(_FLOAT8))
        stored = graph.derived(f"{base}.nvfp4", source, numbers, (n, k), numpy_type(_FLOAT8))
        small = graph.constant(f"{base}.scale", levels)
        unit = graph.constant(f"{base}.unit", np.array(2 * plan.unit, np.float32))
        wide = _two_levels(graph, stored, small, unit, f"{path}/WeightRows")
    else:
        exponents = (np.frexp(scale.T)[1] - 1 + _BIAS).astype(np.uint8)
        stored = graph.derived(f"{base}.mxfp8", source, lambda values: integers(values).T, (n, k), dtype)
        small = graph.constant(f"{base}.scale", exponents)
        wide = _mxfp8_dequantized(graph, stored, small, f"{path}/WeightRows")
    name, attrs = graph.fresh(f"{path}/Weight"), {"perm": [1, 0]}
    return graph.add_node("Transpose", [wide], name, dtype=np.float32, shape=[k, n], attrs=attrs)


def activation(graph: Graph, value: Value, chosen: Dynamic) -> Value:
    """x̂ of `value` [..., K], made by a node named <value>/Dynamic."""
    shape, block = list(value.shape), BLOCK[chosen.kind]
    operands, kind, attrs = [value], MXFP8, {"output_dtype": int(onnx.TensorProto.FLOAT8E4M3FN)}
    if chosen.kind == "nvfp4":
        unit = graph.constant(graph.fresh(f"{value.name}.unit"), np.array(chosen.unit, np.float32))
        operands, kind, attrs = [value, unit], FP4, {"scale_type": int(onnx.TensorProto.FLOAT8E4M3FN)}
    scale_type = np.uint8 if chosen.kind == "mxfp8" else numpy_type(_FLOAT8)
    numbers = _call(
        graph, kind, operands, graph.fresh(f"{value.name}/DynamicQuantize"), numpy_type(_FLOAT8), shape,
        {"axis": -1, "block_size": block, **attrs}, ("Scale", scale_type, [*shape[:-1], shape[-1] // block]),
    )  # fmt: skip
    scale = numbers.inputs[0].outputs[1]
    name = graph.fresh(f"{value.name}/Dynamic")
    if chosen.kind == "mxfp8":
        return _mxfp8_dequantized(graph, numbers, scale, name)
    return _two_levels(graph, numbers, scale, unit, name)


def _two_levels(graph: Graph, numbers: Value, scale: Value, unit: Value, name: str) -> Value:
    shape, blocks = list(numbers.shape), list(scale.shape)
    wide = graph.add_node(
        "DequantizeLinear", [scale, unit], graph.fresh(f"{name}Scale"), dtype=np.float32, shape=blocks
    )
    attrs = {"axis": -1, "block_size": BLOCK["nvfp4"]}
    return graph.add_node("DequantizeLinear", [numbers, wide], name, dtype=np.float32, shape=shape, attrs=attrs)


def _mxfp8_dequantized(graph: Graph, numbers: Value, scale: Value, name: str) -> Value:
    attrs = {"axis": -1, "block_size": BLOCK["mxfp8"], "output_dtype": int(onnx.TensorProto.FLOAT)}
    return _call(graph, MXFP8_DEQUANTIZE, [numbers, scale], name, np.float32, list(numbers.shape), attrs)


def _call(
    graph: Graph, kind: str, operands: list[Value], name: str, dtype: Any, shape: list[int], attrs: dict[str, Any],
    *more: tuple[str, Any, list[int]],
) -> Value:  # fmt: skip
    graph.define(functions()[kind])
    return graph.add_node(kind, operands, name, dtype=dtype, shape=shape, attrs=attrs, domain=DOMAIN, more=more)
