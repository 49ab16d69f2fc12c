"""Quantize the inputs of linears whose plan computes activation parameters at run time.

Legend: x[..., K] the value, K channels; ρ the plan's ratio; L = 2^bits − 1; round: half to even.

    MatMul(x, DequantizeLinear(q_w))  ->  MatMul(x̂, DequantizeLinear(q_w)),   x̂ by kind:
    token    lo = ρ·min(x, 0), hi = ρ·max(x, 0) of each row, Δ = (hi − lo) / L (1 where that is 0), z = round(−lo / Δ);
             x̂ = Δ · (clip(round(x / Δ) + z, 0, L) − z)
    channel  the same of each channel, over the tokens of a sample, an entry of the leading dimension
    mx       u = 2^(⌊log₂(ρ·max|x|)⌋ − 2 + offset), from 2^−125 to 2^127, for 32 channels of a row; v = x / u;
             x̂ = u · clip(round(v / s) · s, −6, 6), s = ½ below |v| = 2, 1 below 4, else 2: E2M1 with E8M0 scales
    mxfp8, nvfp4  with TensorRT's operators: see _block_scaled

It costs what rounding x costs, and at run time the statistics: a reference for what static targets are measured
against, and refused for them. log₂ is inexact at powers of two, so its floor is corrected by a comparison. Linears that
read one value with the same parameters share x̂. Plans with static ranges are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Graph, Value
from vdq_export.passes import _block_scaled
from vdq_export.plan import MX_BLOCK, Dynamic, LayerPlan

NAME = "dynamic_quantize"
AFTER = ("quantize_weights", "qdq")
_TINY = float(np.finfo(np.float32).tiny)
_DONE = re.compile(r"/Dynamic(_\d+)?$")
_LOWEST = -150  # first exponent of the table of powers


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    layers = [layer for layer in context.plan.layers if layer.dynamic] if context.plan and context.bin else []
    if not layers:
        return report
    assert context.plan is not None and context.bin is not None
    if context.spec is None or not context.spec.dynamic:
        raise PlanError(f"{layers[0].name} needs statistics at run time, which the target cannot compute")
    place = context.plan.place(context.bin)
    weights = {node.name: node for node in graph.nodes}
    shared: dict[tuple[int, Dynamic, int], Value] = {}
    for layer in layers:
        if f"{layer.name}/Weight" not in weights:
            raise PlanError(f"no quantized weight for {layer.name}", hint="run quantize_weights first")
        node = weights[f"{layer.name}/Weight"].outputs[0].outputs[0]
        value, chosen = node.inputs[0], layer.dynamic[place]
        if value.inputs and _DONE.search(value.inputs[0].name):
            continue
        key = (id(value), replace(chosen, why=""), layer.activation_bits)
        if key not in shared:
            shared[key] = _quantized(graph, value, chosen, layer)
        node.inputs[0] = shared[key]
        report.did(f"{layer.name}: per {chosen.kind}")
    graph.cleanup()
    return report


@dataclass(frozen=True)
class _Chain:
    """Adds nodes and constants, named after the value they stand behind."""

    graph: Graph
    base: str

    def number(self, name: str, value: float) -> Value:
        return self.graph.constant(self.graph.fresh(f"{self.base}.{name}"), np.array(value, np.float32))

    def axes(self, *axes: int) -> Value:
        return self.graph.constant(self.graph.fresh(f"{self.base}.axes"), np.array(axes, np.int64))

    def op(self, op: str, *inputs: Value, shape: list[int] | None = None, name: str = "", **rest: Any) -> Value:
        """A node; unless given, its shape is the first input's and its type float32."""
        fresh, typed = self.graph.fresh(f"{self.base}/{name or op}"), {"dtype": np.float32, **rest}
        return self.graph.add_node(op, inputs, fresh, shape=shape or list(inputs[0].shape), **typed)

    def reshape(self, value: Value, shape: list[int], name: str = "") -> Value:
        target = self.graph.constant(self.graph.fresh(f"{self.base}.shape"), np.array(shape, np.int64))
        return self.op("Reshape", value, target, shape=shape, name=name)


def _quantized(graph: Graph, value: Value, chosen: Dynamic, layer: LayerPlan) -> Value:
    block = _block_scaled.BLOCK.get(chosen.kind, MX_BLOCK if chosen.kind == "mx" else 1)
    if value.shape[-1] % block:
        raise PlanError(f"layer {layer.name}: {value.shape[-1]} channels in blocks of {block}")
    if chosen.kind in _block_scaled.BLOCK:
        return _block_scaled.activation(graph, value, chosen)
    chain, rank = _Chain(graph, value.name), len(value.shape)
    ratio = chain.number("ratio", chosen.ratio)
    if chosen.kind != "mx":
        along = [rank - 1] if chosen.kind == "token" else list(range(1 if rank > 2 else 0, rank - 1))
        return _affine(chain, value, ratio, 2**layer.activation_bits - 1, along)
    return _mx(chain, value, ratio, chain.number("offset", 2.0 ** (chosen.offset - 2)))


def _affine(chain: _Chain, x: Value, ratio: Value, levels: int, along: list[int]) -> Value:
    one = [1 if axis in along else size for axis, size in enumerate(x.shape)]
    axes, zero = chain.axes(*along), chain.number("zero", 0)
    low = chain.op("Mul", chain.op("Min", chain.op("ReduceMin", x, axes, shape=one), zero), ratio)
    high = chain.op("Mul", chain.op("Max", chain.op("ReduceMax", x, axes, shape=one), zero), ratio)
    step = chain.op("Div", chain.op("Sub", high, low), chain.number("levels", levels))
    empty = chain.op("Less", step, chain.number("tiny", _TINY), dtype=np.bool_)
    step = chain.op("Where", empty, chain.number("one", 1), step)
    point = chain.op("Round", chain.op("Neg", chain.op("Div", low, step)))
    q = chain.op("Add", chain.op("Round", chain.op("Div", x, step)), point)
    q = chain.op("Clip", q, zero, chain.number("highest", levels))
    return chain.op("Mul", chain.op("Sub", q, point), step, name="Dynamic")


def _mx(chain: _Chain, x: Value, ratio: Value, offset: Value) -> Value:
    shape = list(x.shape)
    blocks = chain.reshape(x, [*shape[:-1], shape[-1] // MX_BLOCK, MX_BLOCK])
    peak = chain.op("ReduceMax", chain.op("Abs", blocks), chain.axes(-1), shape=[*shape[:-1], shape[-1] // MX_BLOCK, 1])
    peak = chain.op("Max", chain.op("Mul", peak, ratio), chain.number("tiny", _TINY))
    unit = chain.op("Mul", _power_below(chain, peak), offset)
    unit = chain.op("Clip", unit, chain.number("lowest", 2.0**-125), chain.number("highest", 2.0**127))
    v = chain.op("Div", blocks, unit)
    size, half, one, two = chain.op("Abs", v), *(chain.number("step", s) for s in (0.5, 1, 2))
    step = chain.op("Where", chain.op("Less", size, chain.number("four", 4), dtype=np.bool_), one, two)
    step = chain.op("Where", chain.op("Less", size, two, dtype=np.bool_), half, step)
    v = chain.op("Mul", chain.op("Round", chain.op("Div", v, step)), step)
    v = chain.op("Clip", v, chain.number("minimum", -6), chain.number("maximum", 6))
    return chain.reshape(chain.op("Mul", v, unit), shape, name="Dynamic")


def _power_below(chain: _Chain, x: Value) -> Value:
    """The largest power of two that is at most x; x a normal float32 above 0."""
    powers = np.ldexp(np.float32(1), np.arange(_LOWEST, 128)).astype(np.float32)
    table = chain.graph.constant(chain.graph.fresh(f"{chain.base}.powers"), powers)
    exponent = chain.op("Floor", chain.op("Div", chain.op("Log", x), chain.number("log2", np.log(2))))
    place = chain.op("Sub", exponent, chain.number("first", _LOWEST))
    place = chain.op("Cast", place, dtype=np.int64, attrs={"to": onnx.TensorProto.INT64})
    power = chain.op("Gather", table, place, shape=list(x.shape))
    half, two = chain.number("half", 0.5), chain.number("two", 2)
    above = chain.op("Less", x, power, dtype=np.bool_)
    power = chain.op("Where", above, chain.op("Mul", power, half), power)
    double = chain.op("Mul", power, two)
    return chain.op("Where", chain.op("LessOrEqual", double, x, dtype=np.bool_), double, power)
