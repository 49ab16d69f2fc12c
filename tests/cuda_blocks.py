"""One block of a video transformer with a plan in any format, quantized by the project's own passes, bin by bin.

B 2 samples (each with its own modulation), 6 tokens, 64 channels in 2 heads, an FFN of 192 (a Hadamard matrix of two
factors). Attention and rotary embedding are onnxruntime's nodes already, as the passes of the target leave them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper

from tests.graphs import Builder
from vdq_export import ort, pipeline, targets
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph
from vdq_export.hadamard import largest_block
from vdq_export.plan import (
    INT_RANGE,
    AttentionOperand,
    AttentionPlan,
    Bin,
    HeadScales,
    LayerPlan,
    LowRank,
    QuantPlan,
    Range,
    Rotation,
    Smoothing,
    WeightPlan,
    tensor_name,
)  # fmt: skip
from vdq_export.recipe import Recipe
from vdq_export.targets.cuda.merge import merge

SAMPLES, TOKENS, WIDTH, HEADS, HIDDEN, TURNED = 2, 6, 64, 2, 192, 24
SCALE = 0.1  # of the scores
BINS = (Bin(index=0, t=(500.0, 1000.0), steps=(700.0,)), Bin(index=1, t=(0.0, 500.0), steps=(300.0,)))
PASSES = ("low_rank", "quantize_weights")
INT8 = WeightPlan(dtype="int8", qmax=127, why="test")
INT4 = WeightPlan(dtype="int4", qmax=7, bits=4, why="test")
FP8 = WeightPlan(dtype="float8e4m3fn", qmax=448, grid="e4m3", why="test")
SPEC = targets.load("cuda").spec()


@dataclass(frozen=True)
class Block:
    """weight: without scales. rank: of low-rank branches."""

    weight: WeightPlan
    activation: tuple[str, int] = ("uint8", 8)
    smooth: bool = False
    rotate: bool = False
    rank: int = 0
    attention: str = ""  # "q k" or "q k v": what of it is quantized
    kept: tuple[str, ...] = ()
    delta: float | None = None
    seed: int = 0
    tensors: dict[str, Array] = field(default_factory=dict, compare=False)

    @property
    def feeds(self) -> dict[str, Array]:
        random = np.random.default_rng(self.seed + 1)
        shapes = {"x": (SAMPLES, TOKENS, WIDTH), "modulation": (SAMPLES, 6, WIDTH)}
        return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def floats(self) -> Graph:
        return float_block(self.seed)

    def graphs(self) -> list[Graph]:
        """The Q/DQ graph of each bin."""
        graph = self.floats()
        draft = self._plan(graph, {})
        pipeline.run_passes(graph, pipeline.FLOAT, PassContext(draft, None, SPEC))
        plan = self._plan(graph, ort.run(graph, self.feeds, sorted({x.value.name for x in graph.linears()})))
        context = PassContext(plan, None, SPEC, self.tensors)
        pipeline.run_passes(graph, PASSES, context)
        made = []
        for one in BINS:
            own = graph.copy()
            pipeline.run_passes(own, ("qdq", "attention_qdq"), PassContext(plan, one, SPEC, self.tensors))
            made.append(own)
        return made

    def merged(self) -> tuple[Graph, list[Graph]]:
        """(the graph of both bins, that of each)"""
        graphs = self.graphs()
        held = [{c.name: np.asarray(c.values) for c in graph.constants()} for graph in graphs]
        differ = [name for name in held[0] if not np.array_equal(held[0][name], held[1][name])]
        return merge(graphs[0], [{name: one[name] for name in differ} for one in held]), graphs

    def _plan(self, graph: Graph, values: dict[str, Array]) -> QuantPlan:
        """With what the values of the rotated graph say; without values, what the float passes need."""
        random = np.random.default_rng(self.seed)
        scales = {x.value.name: np.exp(0.3 * random.normal(size=x.shape[0])) for x in graph.linears()}
        layers = []
        for linear in graph.linears():
            k, n = linear.shape
            rest: dict[str, Any] = {"name": linear.name, "value": linear.value.name, "rows": linear.rows}
            rest |= {"shape": (k, n), "activation_dtype": self.activation[0], "activation_bits": self.activation[1]}
            if linear.name in self.kept:
                layers.append(
                    LayerPlan(name=linear.name, value=linear.value.name, rows=1, shape=(k, n), keep_float="x")
                )
                continue
            if values:
                rest |= {"weight": self._weight(linear.name, linear.read_weight())}
                if self.activation[0] != "float":
                    rest["activation"] = tuple(self._range(values[linear.value.name] * gain) for gain in (1.0, 0.7))
                rest["low_rank"] = LowRank(rank=self.rank, error=0.1, why="test") if self.rank else None
            elif self.smooth:
                vector = tuple(scales[linear.value.name].tolist())
                rest["smoothing"] = Smoothing(alpha=0.5, scale=vector, why="test")
            if self.rotate and not values:
                rest["rotation"] = Rotation(block=largest_block(k), why="test")
            layers.append(LayerPlan(**rest))
        recipe = Recipe(name="test", summary="test")
        recipe = replace(recipe, schedule=replace(recipe.schedule, delta=self.delta))
        return QuantPlan(
            model="test", graph_hash="", target="cuda", recipe=recipe, bins=BINS, layers=tuple(layers),
            bins_why="test", draft=not values, attentions=self._attentions() if values else (),
        )  # fmt: skip

    def _weight(self, name: str, weight: Array) -> WeightPlan:
        if self.rank:
            left, sizes, right = np.linalg.svd(weight)
            down, up = left[:, : self.rank] * sizes[: self.rank], right[: self.rank]
            self.tensors[tensor_name(name, "down")] = down.astype(np.float32)
            self.tensors[tensor_name(name, "up")] = up.astype(np.float32)
            weight = weight - down @ up
        groups = weight.reshape(-1, self.weight.group or len(weight), weight.shape[1])
        scale = (np.abs(groups).max(axis=1) / self.weight.qmax).astype(np.float32)
        if self.weight.group:
            self.tensors[tensor_name(name, "scale")] = scale
            return self.weight
        return replace(self.weight, scale=tuple(scale[0].tolist()))

    def _range(self, value: Array) -> Range:
        dtype, bits = self.activation
        lo, hi = float(value.min()) * 0.9, float(value.max()) * 0.8  # some clip
        if dtype == "float8e4m3fn":
            return Range(lo=lo, hi=hi, scale=max(-lo, hi) / 448, zero_point=0, why="test")
        step, low = float(np.float32((hi - lo) / (2**bits - 1))), INT_RANGE[dtype][0]
        return Range(lo=lo, hi=hi, scale=step, zero_point=low + round(-lo / step), why="test")

    def _attentions(self) -> tuple[AttentionPlan, ...]:
        def operand(letter: str, dtype: Any, factor: float = 1.0) -> AttentionOperand | None:
            if letter not in self.attention:
                return None
            bins = tuple(HeadScales(scale=(0.02 * factor * g, 0.03 * factor * g), why="test") for g in (1.0, 0.8))
            return AttentionOperand(value=letter, dtype=dtype, channels=WIDTH // HEADS, bins=bins, factor=factor)

        q, k, v = operand("q", "int8", SCALE), operand("k", "int8"), operand("v", "float8e4m3fn")
        if not self.attention:
            return ()
        return (AttentionPlan(name="attn/MatMul", product="attn/MatMul_1", heads=HEADS, q=q, k=k, v=v),)


def float_block(seed: int = 0) -> Graph:
    """x, modulation -> y: modulated norms, attention with RMS norms and rotary embedding, FFN, gates and residuals."""
    make = Builder(seed)
    chunks = [f"chunk.{i}" for i in range(6)]
    node = helper.make_node("Split", ["modulation"], chunks, name="Split", axis=1, num_outputs=6)
    make.nodes.append(node)
    one = make.param("one", 1.0)

    def linear(x: str, name: str, k: int, n: int, bias: bool = True) -> str:
        make.param(f"{name}.weight", make.random.normal(size=(k, n)) / np.sqrt(k))
        y = make.op("MatMul", x, f"{name}.weight", name=f"{name}/MatMul")
        return make.op("Add", y, make.weight(f"{name}.bias", n), name=f"{name}/Add") if bias else y

    def modulated(x: str, name: str, scale: str, shift: str, *affine: str) -> str:
        normed = make.op("LayerNormalization", x, *affine, name=f"{name}/LayerNormalization", axis=-1, epsilon=1e-6)
        more = make.op("Add", scale, one, name=f"{name}/Add")
        return make.op("Add", make.op("Mul", normed, more, name=f"{name}/Mul"), shift, name=f"{name}/Add_1")

    def turned(x: str, name: str) -> str:
        square = make.op("Pow", x, make.param(f"{name}/two", 2.0), name=f"{name}/Pow")
        mean = make.op("ReduceMean", square, make.param(f"{name}/axis", [-1], "int64"), name=f"{name}/ReduceMean")
        root = make.op("Add", mean, make.param(f"{name}/epsilon", 1e-6), name=f"{name}/Add")
        root = make.op("Sqrt", root, name=f"{name}/Sqrt")
        x = make.op("Mul", make.op("Div", x, root, name=f"{name}/Div"), make.weight(f"{name}.weight", WIDTH), name=name)
        angles = make.random.normal(size=(TOKENS, TURNED // 2))
        tables = [make.param(f"{name}.{f.__name__}", f(angles)) for f in (np.cos, np.sin)]
        offset = make.param(f"{name}.offset", [0], "int64")
        attrs = {"num_heads": HEADS, "rotary_embedding_dim": TURNED, "domain": "com.microsoft"}
        return make.op("RotaryEmbedding", x, offset, *tables, name=f"{name}/Rotary", **attrs)

    def added(x: str, y: str, gate: str, name: str) -> str:
        return make.op("Add", x, make.op("Mul", y, gate, name=f"{name}/Mul"), name=f"{name}/Add")

    value = modulated("x", "norm1", chunks[1], chunks[0], make.param("norm1.ones", np.ones(WIDTH)))
    q, k, v = (linear(value, f"attn.to_{letter}", WIDTH, WIDTH, letter != "v") for letter in "qkv")
    attrs = {"num_heads": HEADS, "scale": SCALE, "domain": "com.microsoft"}
    out = make.op("MultiHeadAttention", turned(q, "norm_q"), turned(k, "norm_k"), v, name="attn/Attention", **attrs)
    h = added("x", linear(out, "attn.to_out", WIDTH, WIDTH), chunks[2], "attn")
    affine = make.weight("norm2.weight", WIDTH), make.weight("norm2.bias", WIDTH)
    up = linear(modulated(h, "norm2", chunks[4], chunks[3], *affine), "ffn.up", WIDTH, HIDDEN)
    up = make.op("Gelu", up, name="ffn/Gelu", approximate="tanh")
    y = added(h, linear(up, "ffn.down", HIDDEN, WIDTH), chunks[5], "ffn")
    return _graph(make, y)


def _graph(make: Builder, output: str) -> Graph:
    tokens = [SAMPLES, TOKENS, WIDTH]
    shapes = {"x": tokens, "modulation": [SAMPLES, 6, WIDTH], output: tokens}
    shapes |= dict.fromkeys(("norm_q/Rotary", "norm_k/Rotary", "attn/Attention"), tokens)
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    given = [info.pop("x"), info.pop("modulation")]
    graph = helper.make_graph(
        make.nodes, "block", given, [info.pop(output)], make.params, value_info=list(info.values())
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model))
