"""Hand-made graphs, plans and the exactness check that the tests of the smoothing pass share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from vdq_export import ort
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph
from vdq_export.passes import smoothing
from vdq_export.plan import Bin, LayerPlan, QuantPlan, Range, Smoothing, WeightPlan
from vdq_export.recipe import Recipe

WIDTHS = (1, 7, 12, 13, 192)
TOKENS = 5
EXACT = 1e-5


class Net:
    """A hand-made graph over tokens x[1, T, C]; every method returns the name of the value it made."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.random = np.random.default_rng(width)
        self.nodes: list[onnx.NodeProto] = []
        self.params: list[onnx.TensorProto] = []
        self.inputs: dict[str, list[int]] = {"x": [1, TOKENS, width]}

    def op(self, kind: str, *inputs: str, name: str, also: tuple[str, ...] = (), **attrs: object) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name, *also], name=name, **attrs))
        return name

    def param(self, name: str, value: Array | list[int]) -> str:
        array = np.asarray(value)
        kind = np.int64 if array.dtype.kind == "i" else np.float32
        self.params.append(numpy_helper.from_array(array.astype(kind), name))
        return name

    def normal(self, name: str, *shape: int) -> str:
        return self.param(name, self.random.normal(size=shape) + 0.1)

    def given(self, name: str, *shape: int) -> str:
        self.inputs[name] = list(shape)
        return name

    def linear(self, x: str, layer: str, k: int | None = None, n: int | None = None, bias: bool = True) -> str:
        k, n = k or self.width, n or self.width
        y = self.op(
            "MatMul", x, self.param(f"{layer}.weight", self.random.normal(size=(k, n)) / k**0.5), name=f"{layer}/MatMul"
        )
        return self.op("Add", y, self.normal(f"{layer}.bias", n), name=f"{layer}/Add") if bias else y

    def graph(self, *outputs: str) -> Graph:
        infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in self.inputs.items()]
        results = [onnx.ValueInfoProto(name=o) for o in outputs]
        for result in results:
            result.type.tensor_type.elem_type = TensorProto.FLOAT
        made = helper.make_graph(self.nodes, "net", infos, results, self.params)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return Graph.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def plan_for(graph: Graph, *, kept: tuple[str, ...] = (), plain: tuple[str, ...] = (), seed: int = 0) -> QuantPlan:
    """Random scales over two decades for every linear's value; layers `kept` in float, or `plain` (no smoothing)."""
    random = np.random.default_rng(seed)
    scales: dict[str, tuple[float, ...]] = {}
    layers = []
    for linear in graph.linears():
        k, n = linear.shape
        scale = scales.setdefault(linear.value.name, tuple(np.exp(random.normal(size=k)).tolist()))
        rest = {"name": linear.name, "value": linear.value.name, "rows": linear.rows, "shape": (k, n)}
        if linear.name in kept:
            layers.append(LayerPlan(**rest, keep_float="test"))
            continue
        folded = np.asarray(scale)[:, None] * linear.weight.values
        columns = tuple((np.maximum(np.abs(folded).max(axis=0), 1e-6) / 127).tolist())
        layers.append(
            LayerPlan(
                **rest,
                smoothing=None if linear.name in plain else Smoothing(alpha=0.5, scale=scale, why="test"),
                weight=WeightPlan(dtype="int8", qmax=127, scale=columns, why="test"),
                activation=(Range(lo=-1, hi=1, scale=0.1, zero_point=128, why="test"),),
            )
        )
    return made_plan(layers)


def made_plan(layers: list[LayerPlan]) -> QuantPlan:
    bins = (Bin(index=0, t=(0.0, 1000.0), steps=(500.0,)),)
    recipe = Recipe(name="test", summary="test")
    return QuantPlan(
        model="test", graph_hash="", target="test", recipe=recipe, bins=bins, layers=tuple(layers), bins_why="test"
    )


def with_scale(plan: QuantPlan, layer: str, scale: tuple[float, ...] | None) -> QuantPlan:
    wanted = None if scale is None else Smoothing(alpha=0.5, scale=scale, why="test")
    return made_plan([replace(x, smoothing=wanted) if x.name == layer else x for x in plan.layers])


def error(before: Graph, after: Graph, feeds: Mapping[str, Array] | None = None) -> float:
    """Largest difference of any output, relative to that output's largest value."""
    random = np.random.default_rng(5)
    fed = feeds or {v.name: random.normal(size=v.shape).astype(np.float32) for v in before.gs.inputs}
    a, b = ort.run(before, fed, threads=1), ort.run(after, fed, threads=1)
    assert a.keys() == b.keys()
    assert all(np.isfinite(v).all() for v in [*a.values(), *b.values()])
    # LayerNorm over one channel is 0 everywhere: absolute there
    return max(float(np.abs(a[k] - b[k]).max() / (np.abs(a[k]).max() or 1.0)) for k in a)


def smoothed(graph: Graph, plan: QuantPlan) -> tuple[Graph, PassReport]:
    """A smoothed copy; weights must really have changed, the original must not, and the layers keep their names."""
    kept, after = graph.hash(), graph.copy()
    report = smoothing.run(after, PassContext(plan=plan))
    assert graph.hash() == kept
    assert [x.matmul.name for x in after.linears()] == [x.matmul.name for x in graph.linears()]
    planned = {x.name: np.asarray(x.smoothing.scale) for x in plan.layers if x.smoothing}
    for linear in after.linears():
        assert (".smoothed-" in linear.weight.name) >= (linear.name in planned)
    return after, report


def places(report: PassReport) -> dict[str, int]:
    """{value: place} from the details."""
    pairs = (line.split(": place ") for line in report.details if ": place " in line)
    return {name: int(rest[0]) for name, rest in pairs}


def inserted(graph: Graph) -> list[list[int]]:
    return [list(n.outputs[0].shape) for n in graph.nodes if "Mul.smooth" in n.name]


def norm_net(width: int, kind: str) -> Graph:
    net = Net(width)
    if kind == "rms":
        square = net.op("Pow", "x", net.param("two", np.array(2.0)), name="norm/Pow")
        mean = net.op("ReduceMean", square, net.param("axes", [-1]), name="norm/ReduceMean", keepdims=1)
        root = net.op("Sqrt", net.op("Add", mean, net.param("eps", np.array(1e-6)), name="norm/Add"), name="norm/Sqrt")
        y = net.op("Mul", net.op("Div", "x", root, name="norm/Div"), net.normal("norm.weight", width), name="norm/Mul")
    else:
        weight = net.param("norm.weight", np.ones(width)) if kind == "ones" else net.normal("norm.weight", width)
        bias = (net.normal("norm.bias", width),) if kind == "affine" else ()
        y = net.op("LayerNormalization", "x", weight, *bias, name="norm/LayerNormalization", axis=-1, epsilon=1e-5)
    return net.graph(net.linear(y, "q"), net.linear(y, "k", n=3))


def attention_net(width: int, heads: int) -> Graph:
    """to_v -> heads -> P·V -> tokens -> to_out, the way torch exports it."""
    net = Net(width)
    dim = width // heads
    v = net.op("Reshape", net.linear("x", "to_v"), net.param("s1", [1, TOKENS, heads, dim]), name="attn/Reshape")
    v = net.op("Transpose", v, name="attn/Transpose", perm=[0, 2, 1, 3])
    p = net.op("Softmax", net.given("scores", 1, heads, TOKENS, TOKENS), name="attn/Softmax", axis=-1)
    o = net.op("Transpose", net.op("MatMul", p, v, name="attn/MatMul"), name="attn/Transpose_1", perm=[0, 2, 1, 3])
    o = net.op("Reshape", o, net.param("s2", [1, TOKENS, width]), name="attn/Reshape_1")
    return net.graph(net.linear(o, "to_out"))


def gated_net(width: int, fused: bool) -> Graph:
    """down(up · gelu(gate)), up and gate two linears or the halves of one."""
    net, inner = Net(width), 2 * width + 1
    if fused:
        both = net.linear("x", "proj", n=2 * inner)
        up = net.op(
            "Split", both, net.param("halves", [inner, inner]), name="ffn/Split", also=("ffn/Split:1",), axis=-1
        )
        gate = "ffn/Split:1"
    else:
        up, gate = net.linear("x", "up", n=inner, bias=False), net.linear("x", "gate", n=inner)
    hidden = net.op("Mul", net.op("Gelu", gate, name="ffn/Gelu"), up, name="ffn/Mul")
    halved = net.op("Mul", hidden, net.param("half", np.array(0.5)), name="ffn/Mul_1")
    return net.graph(net.linear(halved, "down", k=inner))


def adaln_net(width: int, own: bool) -> Graph:
    """LN -> ·(1 + γ) + β -> q, k. own: the modulation linear is this block's; else two share it. Plus a table."""
    net = Net(width)
    t = net.op(
        "Reshape",
        net.linear(net.given("temb", 1, width), "time_proj", n=2 * width),
        net.param("s", [1, 2, width]),
        name="six",
    )
    outputs = []
    for block in ("b0",) if own else ("b0", "b1"):
        m = net.op("Add", net.normal(f"{block}.table", 1, 2, width), t, name=f"{block}/Add")
        net.op(
            "Split", m, net.param(f"{block}.sizes", [1, 1]), name=f"{block}/Split", also=(f"{block}/Split:1",), axis=1
        )
        one = net.op("Add", f"{block}/Split:1", net.param(f"{block}.one", np.array(1.0)), name=f"{block}/Add_1")
        y = net.op("LayerNormalization", "x", net.param(f"{block}.ones", np.ones(width)), name=f"{block}/LN")
        y = net.op("Mul", y, one, name=f"{block}/Mul")
        y = net.op("Add", y, f"{block}/Split", name=f"{block}/Add_2")
        outputs += [net.linear(y, f"{block}.q"), net.linear(y, f"{block}.k", n=3)]
    return net.graph(*outputs)
