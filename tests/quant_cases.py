"""Two linears on one value, with a plan of any format, and what they must put out: numpy, from the definitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vdq_export import ort, pipeline, targets
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph
from vdq_export.plan import INT_RANGE, Bin, Dynamic, LayerPlan, QuantPlan, Range, WeightPlan, tensor_name
from vdq_export.recipe import Recipe, ScheduleRecipe
from vdq_export.target_spec import TargetSpec
from vdq_export.weights.number_grid import dequantize

NAMES = ("first", "second")  # with a bias and without
OUTPUTS = {"first": "first/Add", "second": "second/MatMul"}
BIN = Bin(index=0, t=(0.0, 1000.0), steps=(500.0,))


@dataclass
class Case:
    """Shapes and formats of both linears; `tensors` and `plan` are made from them."""

    weight: WeightPlan  # without scales
    activation: tuple[str, int] = ("uint8", 8)
    shape: tuple[int, ...] = (2, 5, 64)
    columns: int = 6
    seed: int = 0
    delta: float | None = None
    dynamic: Dynamic | None = None
    weights: dict[str, Array] = field(default_factory=dict)
    scales: dict[str, Array] = field(default_factory=dict)
    codes: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng, k, plan = np.random.default_rng(self.seed), self.shape[-1], self.weight
        self.x = rng.normal(size=self.shape).astype(np.float32)
        self.bias = rng.normal(size=self.columns).astype(np.float32)
        for name in NAMES:
            rows = k // plan.group if plan.group else 1
            scale = np.exp2(rng.integers(-9, -4, (rows, self.columns))).astype(np.float32)
            if plan.grid == "int":
                scale *= rng.uniform(1, 2, scale.shape).astype(np.float32)
            self.scales[name] = scale if plan.group else scale[0]
            self.codes[name] = _levels(plan)[rng.integers(0, len(_levels(plan)), (k, self.columns))]
            self.weights[name] = dequantize(self.codes[name], self.scales[name])
        dtype, bits = self.activation
        lo, hi = min(float(self.x.min()) * 0.8, -0.1), max(float(self.x.max()) * 0.6, 0.1)  # most cases clip
        low = INT_RANGE[dtype][0]
        step = float(np.float32((hi - lo) / (2**bits - 1)))
        self.range = Range(lo=lo, hi=hi, scale=step, zero_point=low + round(-lo / step), why="test")

    @property
    def graph(self) -> Graph:
        """out = (x·W₁ + b, x·W₂); x is computed, so that its quantizer stands inside the graph."""
        weights = [numpy_helper.from_array(w, f"{name}.weight") for name, w in self.weights.items()]
        nodes = [
            helper.make_node("Identity", ["in"], ["x"], name="x"),
            helper.make_node("MatMul", ["x", "first.weight"], ["first/MatMul"], name="first/MatMul"),
            helper.make_node("Add", ["first/MatMul", "first.bias"], ["first/Add"], name="first/Add"),
            helper.make_node("MatMul", ["x", "second.weight"], ["second/MatMul"], name="second/MatMul"),
        ]
        made = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("in", TensorProto.FLOAT, self.shape)],
            [
                helper.make_tensor_value_info(o, TensorProto.FLOAT, [*self.shape[:-1], self.columns])
                for o in OUTPUTS.values()
            ],
            [*weights, numpy_helper.from_array(self.bias, "first.bias")],
        )
        proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return Graph.from_proto(onnx.shape_inference.infer_shapes(proto))

    @property
    def plan(self) -> QuantPlan:
        layers = []
        for name in NAMES:
            scale = () if self.weight.group else tuple(self.scales[name].tolist())
            weight = WeightPlan(**{**_fields(self.weight), "scale": scale})
            static = not self.dynamic and self.activation[0] != "float"
            layers.append(
                LayerPlan(
                    name=name, value="x", rows=int(np.prod(self.shape[:-1])), shape=(self.shape[-1], self.columns),
                    weight=weight, activation_dtype=self.activation[0], activation_bits=self.activation[1],  # type: ignore[arg-type]
                    activation=(self.range,) if static else (), dynamic=(self.dynamic,) if self.dynamic else (),
                )
            )  # fmt: skip
        recipe = Recipe(name="test", summary="test", schedule=ScheduleRecipe(delta=self.delta))
        return QuantPlan(
            model="test",
            graph_hash="",
            target="test",
            recipe=recipe,
            bins=(BIN,),
            layers=tuple(layers),
            bins_why="test",
        )

    @property
    def tensors(self) -> dict[str, Array]:
        found = {tensor_name(name, "codes"): codes for name, codes in self.codes.items() if self.weight.codes}
        return found | {tensor_name(n, "scale"): s for n, s in self.scales.items() if self.weight.group}

    def context(self, spec: TargetSpec) -> PassContext:
        return PassContext(self.plan, BIN, spec, self.tensors)

    def quantized(self, spec: TargetSpec) -> Graph:
        graph = self.graph
        pipeline.run_passes(graph, ("quantize_weights", *pipeline.PER_BIN), self.context(spec))
        return graph

    def run(self, graph: Graph, spec: TargetSpec, outputs: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs and the inner values named, in a session as the target wants it."""
        return ort.run(graph, {"in": self.x}, outputs, options=targets.load(spec.name).session_options(spec))

    def x_hat(self) -> Array:
        """Δ·(clip(round(x / Δ) + z, qmin, qmin + 2^bits − 1) − z), float64; the quotient in float32 as ONNX has it."""
        low, scale = INT_RANGE[self.activation[0]][0], np.float32(self.range.scale)
        q = np.round(self.x / scale).astype(np.float64) + self.range.zero_point
        high = low + 2 ** self.activation[1] - 1
        return (np.minimum(np.maximum(q, low), high) - self.range.zero_point) * np.float64(scale)

    def expected(self, x_hat: Array) -> dict[str, Array]:
        """Outputs by name, float64."""
        products = {name: x_hat @ self.w_hat(name) for name in NAMES}
        return {"first/Add": products["first"] + self.bias, "second/MatMul": products["second"]}

    def w_hat(self, name: str) -> Array:
        """scale of (group of k, n) times the code at (k, n), one by one."""
        scale, codes = self.scales[name], self.codes[name].astype(np.float64)
        for k, n in np.ndindex(codes.shape):
            codes[k, n] *= scale[k // self.weight.group, n] if self.weight.group else scale[n]
        return codes

    def tolerance(self, x_hat: Array, name: str, integer: bool) -> Array:
        """What float32 may be off: 2^-23 of the sum of magnitudes for each of 4 roundings (K terms add up as √K would,
        which 4 covers to K = 128 with the sum of magnitudes far above the sum), and half a step of the int32 bias."""
        magnitudes = np.abs(x_hat) @ np.abs(self.w_hat(name)) + np.abs(self.bias)
        step = 0.5 * self.range.scale * self.scales[name] if integer and name == "first" else 0.0
        return 4 * 2.0**-23 * magnitudes + step


def _levels(plan: WeightPlan) -> Array:
    if plan.grid == "e2m1":
        magnitudes = np.array([0, 1, 2, 3, 4, 6, 8, 12])
        return np.concatenate([-magnitudes[:0:-1], magnitudes]).astype(np.int8)
    return np.arange(-plan.qmax, plan.qmax + 1).astype(np.int8 if plan.qmax < 128 else np.int16)


def _fields(plan: WeightPlan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__struct_fields__}
