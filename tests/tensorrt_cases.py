"""Two linears in each of TensorRT's formats, as quant_cases makes them; graphs that break one published rule each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.quant_cases import NAMES, Case
from vdq_export.calib import weight_ranges
from vdq_export.calib.formats import FLOATING, WeightFormat
from vdq_export.graph import Array, Graph
from vdq_export.handoff.trt_functions import DOMAIN, FP4, MXFP8, functions
from vdq_export.plan import Dynamic, Range, WeightPlan

FORMATS: dict[str, WeightFormat] = {
    "int8": WeightFormat("int8", 8, 127),
    "int4": WeightFormat("int4", 4, 7, 64),
    **{name: FLOATING[name] for name in ("fp8", "nvfp4", "mxfp8")},
}
_PEAK = {"int8": 127, "fp8": 448}


def case(name: str, seed: int = 0) -> Case:
    """Random weights rounded to the format; activations cover 0.8 of what is seen, so that some clip."""
    fmt = FORMATS[name]
    made = Case(WeightPlan(dtype="int8", qmax=127, why=""), shape=(2, 5, 64), seed=seed)
    rng = np.random.default_rng(seed)
    sizes = {which: rng.uniform(0.1, 2, made.columns) for which in NAMES}
    exact = {which: (rng.normal(size=(64, made.columns)) * sizes[which]).astype(np.float32) for which in NAMES}
    if fmt.scales == "e4m3":  # one plan serves both layers here: one unit, too
        fmt = weight_ranges.fitted(np.concatenate(list(exact.values()), axis=1), fmt)
    for which, weight in exact.items():
        made.scales[which] = weight_ranges.scales(weight, fmt)
        made.codes[which] = weight_ranges.quantize(weight, made.scales[which], fmt)
        made.weights[which] = weight_ranges.dequantize(made.codes[which], made.scales[which], fmt)
    made.weight = WeightPlan(
        dtype=fmt.dtype, qmax=fmt.qmax, why="", bits=fmt.bits, group=fmt.group, grid=fmt.grid, scales=fmt.scales,
        unit=fmt.unit, codes=True,
    )  # fmt: skip
    peak = float(np.abs(made.x).max())
    if name in _PEAK:
        made.activation = ("int8", 8) if name == "int8" else ("float8e4m3fn", 8)
        scale32 = float(np.float32(0.8 * peak / _PEAK[name]))
        made.range = Range(lo=-peak, hi=peak, scale=scale32, zero_point=0, why="")
    elif name == "int4":
        made.activation = ("float", 16)
    else:
        unit = float(np.float32(2.0**-10 * 1.0625)) if name == "nvfp4" else 0.0
        made.activation, made.dynamic = ("float8e4m3fn", 8), Dynamic(kind=name, why="", unit=unit)  # type: ignore[arg-type]
    return made


def x_hat(name: str, made: Case) -> Array:
    """What the quantizer makes of x, from the definitions, with ml_dtypes' rounding; float64."""
    x = made.x.astype(np.float32)
    if name == "int4":
        return x.astype(np.float64)
    if name in _PEAK:
        scale = np.float32(made.range.scale)
        if name == "int8":
            return np.clip(np.rint(x / scale), -128, 127).astype(np.float64) * scale
        return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    block = FORMATS[name].group
    blocks = x.reshape(*x.shape[:-1], -1, block)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    if name == "mxfp8":
        unit = 2.0 ** np.ceil(np.log2(largest.astype(np.float64) / 448))
        numbers = (blocks / unit).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    else:
        assert made.dynamic is not None
        levels = largest / (np.float32(6) * np.float32(made.dynamic.unit))
        levels = np.minimum(levels, 448).astype(ml_dtypes.float8_e4m3fn)
        unit = levels.astype(np.float64) * made.dynamic.unit
        numbers = np.clip(blocks / unit.astype(np.float32), -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return (numbers.astype(np.float64) * unit).reshape(x.shape)


# -- planted: {rule: graph that breaks it}; clean() breaks none ------------------------------------------------------


def product(
    activation: Any = np.int8, weight: Any = np.int8, *, zero: int = 0, scale: Any = 0.1, act_axis: int | None = None,
    block: int = 0, weight_scale: Any = np.float32, opset: int = 23, computed: bool = False, plain: bool = False,
) -> Graph:  # fmt: skip
    """x[4, 128] · W[128, 32] with Q/DQ of these types. computed: W is a graph input; plain: x has no Q/DQ."""
    kind = lambda dtype: helper.np_dtype_to_tensor_dtype(np.dtype(dtype))  # noqa: E731
    nodes, values = [], {}
    value = "x"
    if not plain:
        values["xs"] = np.full([4] if act_axis is not None else [], scale, np.float32)
        values["xz"] = np.full(values["xs"].shape, zero).astype(activation)
        attrs = {} if act_axis is None else {"axis": act_axis}
        nodes.append(helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="q", **attrs))
        nodes.append(helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dq", **attrs))
        value = "xd"
    shape = [128 // block, 32] if block else [32]
    values["ws"] = np.full(shape, 0.5, weight_scale)
    attrs = {"axis": 0, "block_size": block} if block else {"axis": 1}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 128])]
    if computed:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [128, 32]))
        nodes.append(
            helper.make_node("QuantizeLinear", ["w", "ws"], ["wq"], name="wq", output_dtype=kind(weight), **attrs)
        )
    else:
        values["wq"] = np.ones([128, 32]).astype(weight)
    nodes.append(helper.make_node("DequantizeLinear", ["wq", "ws"], ["wd"], name="w", **attrs))
    nodes.append(helper.make_node("MatMul", [value, "wd"], ["y"], name="y"))
    return _graph(nodes, inputs, values, [4, 32], opset)


def dynamic(op: str = FP4, block: int = 16, shape: tuple[int, ...] = (1, 4, 64), axis: int | None = -1) -> Graph:
    """A dynamic quantizer alone; its numbers go nowhere else."""
    attrs = {"block_size": block} | ({} if axis is None else {"axis": axis})
    attrs |= (
        {"scale_type": int(TensorProto.FLOAT8E4M3FN)} if op == FP4 else {"output_dtype": int(TensorProto.FLOAT8E4M3FN)}
    )
    inputs = ["x", "unit"] if op == FP4 else ["x"]
    nodes = [
        helper.make_node(op, inputs, ["q", "s"], name="quantize", domain=DOMAIN, **attrs),
        helper.make_node("Cast", ["q"], ["y"], name="y", to=TensorProto.FLOAT),
    ]
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = _graph(nodes, x, {"unit": np.array(0.01, np.float32)}, list(shape), 21)
    graph.define(functions()[op])
    return graph


def attention(quantized: tuple[bool, bool]) -> Graph:
    """q[2, 8, 16] · k[2, 16, 8], each operand with or without a pair in INT8."""
    nodes, names = [], []
    for name, wanted in zip("qk", quantized, strict=True):
        nodes.append(helper.make_node("Identity", [name], [f"{name}1"], name=f"{name}1"))
        if wanted:
            nodes.append(helper.make_node("QuantizeLinear", [f"{name}1", "s", "z"], [f"{name}2"], name=f"{name}2"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}2", "s", "z"], [f"{name}3"], name=f"{name}3"))
        names.append(f"{name}3" if wanted else f"{name}1")
    nodes.append(helper.make_node("MatMul", names, ["y"], name="y"))
    inputs = [
        helper.make_tensor_value_info("q", TensorProto.FLOAT, [2, 8, 16]),
        helper.make_tensor_value_info("k", TensorProto.FLOAT, [2, 16, 8]),
    ]
    return _graph(nodes, inputs, {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}, [2, 8, 8], 21)


def operator(op: str) -> Graph:
    node = helper.make_node(op, ["x"], ["q", "s", "z"], name="n")
    last = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq")
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])]
    return _graph([node, last], x, {}, [4, 4], 21)


def _graph(nodes: Any, inputs: Any, values: dict[str, Array], shape: list[int], opset: int) -> Graph:
    stored = [numpy_helper.from_array(array, name) for name, array in values.items()]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    made = helper.make_graph(nodes, "g", inputs, output, stored)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    proto = helper.make_model(made, opset_imports=imports, ir_version=11)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


F8, F4, I4, E8 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.int4, ml_dtypes.float8_e8m0fnu
PLANTED: dict[str, tuple[str, Callable[[], Graph]]] = {
    "uint8": ("type", lambda: product(np.uint8)),
    "int16": ("type", lambda: product(np.int16)),
    "int4 before opset 21": ("type", lambda: product(weight=I4, block=64, plain=True, opset=20)),
    "asymmetric": ("zero-point", lambda: product(zero=3)),
    "scale of 0": ("scale-positive", lambda: product(scale=0.0)),
    "mxfp4 weight": ("scale-type", lambda: product(weight=F4, block=32, weight_scale=E8, plain=True, opset=24)),
    "mxfp4 blocks": ("fp4-blocks", lambda: product(weight=F4, block=32, plain=True)),
    "channels of an int8 activation": ("int8-activation", lambda: product(act_axis=0)),
    "channels of an fp8 activation": ("fp8-activation", lambda: product(F8, F8, act_axis=0)),
    "int4 activation": ("int4-activation", lambda: product(weight=I4, block=64, plain=True, computed=True)),
    "int4 per channel": ("int4-granularity", lambda: product(weight=I4, plain=True)),
    "int4 blocks of 32": ("int4-blocks", lambda: product(weight=I4, block=32, plain=True)),
    "static fp4 activation": ("fp4-activation", lambda: product(weight=F4, block=16, plain=True, computed=True)),
    "nvfp4 blocks of 32": ("fp4-dynamic", lambda: dynamic(block=32)),
    "nvfp4 axis left out": ("fp4-dynamic", lambda: dynamic(axis=None)),
    "nvfp4 of rank 4": ("fp4-dynamic", lambda: dynamic(shape=(1, 2, 4, 64))),
    "mxfp8 blocks of 16": ("mxfp8-dynamic", lambda: dynamic(MXFP8, block=16)),
    "run-time quantization": ("integer-operators", lambda: operator("DynamicQuantizeLinear")),
    "float activation, int8 weight": ("both-operands", lambda: product(plain=True)),
    "int8 activation, fp8 weight": ("both-operands", lambda: product(weight=F8)),
    "one pair missing at attention": ("both-operands", lambda: attention((True, False))),
}
CLEAN: dict[str, Callable[[], Graph]] = {
    "int8": product,
    "fp8": lambda: product(F8, F8),
    "int4": lambda: product(weight=I4, block=128, plain=True),
    "fp4 weight": lambda: product(weight=F4, block=16, plain=True),
    "nvfp4": dynamic,
    "mxfp8": lambda: dynamic(MXFP8, block=32),
    "attention in int8": lambda: attention((True, True)),
    "attention in float": lambda: attention((False, False)),
}
