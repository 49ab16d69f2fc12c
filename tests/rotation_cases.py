"""Graphs, plans and checks that the tests of rotation share; graphs and exactness are those of smoothing's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from tests.smoothing_cases import TOKENS, Net, made_plan, plan_for
from vdq_export import pipeline
from vdq_export.calib.rotation import choose
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Linear
from vdq_export.plan import LayerPlan, QuantPlan, Rotation
from vdq_export.recipe import RotationRecipe
from vdq_export.target_spec import TargetSpec

HADAMARD = RotationRecipe(kind="hadamard")


def readers(graph: Graph, kept: Sequence[str] = ()) -> dict[str, list[Linear]]:
    """{value: quantized linears that read it}"""
    found: dict[str, list[Linear]] = {}
    for linear in graph.linears():
        if linear.name not in kept:
            found.setdefault(linear.value.name, []).append(linear)
    return found


def rotation_plan(
    graph: Graph,
    *,
    block: int = 0,
    scaled: bool = False,
    smooth: bool = False,
    kept: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> QuantPlan:
    """Rotations as chosen, or blocks of `block` for everything (the layers `only`); scaled: random c; smooth: and s."""
    chosen = choose(graph, readers(graph, kept), HADAMARD)
    random = np.random.default_rng(3)
    scales = {name: tuple(np.exp(random.normal(size=n)).tolist()) for name, n in _widths(graph).items()}

    def turned(layer: LayerPlan) -> LayerPlan:
        rotation = Rotation(block=block, why="test") if block else chosen.get(layer.value, (None, ""))[0]
        if layer.keep_float or (only and layer.name not in only):
            return replace(layer, smoothing=None)
        if rotation is not None and scaled:
            rotation = replace(rotation, scale=scales[layer.value])
        return replace(layer, rotation=rotation, smoothing=layer.smoothing if smooth else None)

    return made_plan([turned(layer) for layer in plan_for(graph, kept=kept).layers])


def _widths(graph: Graph) -> dict[str, int]:
    return {linear.value.name: linear.shape[0] for linear in graph.linears()}


def rotated(graph: Graph, plan: QuantPlan, spec: TargetSpec | None = None) -> tuple[Graph, PassReport]:
    """A copy after smoothing and rotation. The original stays, layers keep names, turned weights are marked."""
    kept, after = graph.hash(), graph.copy()
    report = pipeline.run_passes(after, pipeline.FLOAT, PassContext(plan=plan, spec=spec))[-1]
    assert report.name == "rotation"
    assert graph.hash() == kept
    assert [x.matmul.name for x in after.linears()] == [x.matmul.name for x in graph.linears()]
    marked = {x.name for x in after.linears() if ".rotated-" in x.weight.name}
    assert marked == {x.name for x in plan.layers if x.rotation and (x.rotation.block > 1 or x.rotation.scale)}
    return after, report


def fused(report: PassReport) -> dict[str, str]:
    """{value: producers} of the rotations that cost nothing."""
    pairs = (line.split(" fused into ") for line in report.details if " fused into " in line)
    return {head.split(": blocks of ")[0]: rest.split(" for ")[0] for head, rest in pairs}


def explicit(report: PassReport) -> dict[str, str]:
    """{value: why it is not fused} of the others."""
    pairs = (line.split("; not fused: ") for line in report.details if "; not fused: " in line)
    return {head.split(": blocks of ")[0]: rest for head, rest in pairs}


def inserted(graph: Graph, op: str = "") -> list[list[int]]:
    """Output shapes of the rotations' own nodes, of one op or all."""
    return [list(n.outputs[0].shape) for n in graph.nodes if "/Rotate" in n.name and op in ("", n.op)]


def joint_net(width: int, heads: int, *, sliced: bool = False, tokens: tuple[int, int] = (TOKENS, 3)) -> Graph:
    """Two streams, one attention: V is [text; image] along the tokens, the merged heads are split again."""
    net, dim, total = Net(width), width // heads, sum(tokens)
    text = net.given("text", 1, tokens[1], width)
    parts = []
    for x, name, count in (("x", "to_v", tokens[0]), (text, "add_v", tokens[1])):
        shape = net.param(f"{name}.shape", [1, count, heads, dim])
        v = net.op("Reshape", net.linear(x, name, bias=name == "to_v"), shape, name=f"{name}.heads/Reshape")
        parts.append(net.op("Transpose", v, name=f"{name}.heads/Transpose", perm=[0, 2, 1, 3]))
    v = net.op("Concat", *parts, name="attn/Concat", axis=2)
    p = net.op("Softmax", net.given("scores", 1, heads, total, total), name="attn/Softmax", axis=-1)
    o = net.op("Transpose", net.op("MatMul", p, v, name="attn/MatMul"), name="attn/Transpose", perm=[0, 2, 1, 3])
    o = net.op("Reshape", o, net.param("merged", [1, total, width]), name="attn/Reshape")
    if sliced:
        for name, start, end in (("attn/Split", 0, tokens[0]), ("attn/Split:1", tokens[0], total)):
            where = [net.param(f"{name}.{what}", [n]) for what, n in (("start", start), ("end", end), ("axis", 1))]
            net.op("Slice", o, *where, name=name)
        return net.graph(net.linear("attn/Split", "to_out"), net.linear("attn/Split:1", "to_add_out"))
    both = net.op("Split", o, net.param("counts", list(tokens)), name="attn/Split", also=("attn/Split:1",), axis=1)
    return net.graph(net.linear(both, "to_out"), net.linear("attn/Split:1", "to_add_out"))


def qkv_net(width: int, heads: int) -> Graph:
    """One linear makes q, k and v; v is the last third of its columns."""
    net, dim = Net(width), width // heads
    qkv = net.linear("x", "qkv", n=3 * width)
    net.op("Split", qkv, net.param("thirds", [width] * 3), name="q/Split", also=("k/Split:1", "v/Split:2"), axis=-1)
    v = net.op("Reshape", "v/Split:2", net.param("s1", [1, TOKENS, heads, dim]), name="attn/Reshape")
    v = net.op("Transpose", v, name="attn/Transpose", perm=[0, 2, 1, 3])
    p = net.op("Softmax", net.given("scores", 1, heads, TOKENS, TOKENS), name="attn/Softmax", axis=-1)
    o = net.op("Transpose", net.op("MatMul", p, v, name="attn/MatMul"), name="attn/Transpose_1", perm=[0, 2, 1, 3])
    o = net.op("Reshape", o, net.param("s2", [1, TOKENS, width]), name="attn/Reshape_1")
    return net.graph(net.linear(o, "to_out"), "q/Split", "k/Split:1")


def layout_net(heads: int, dim: int, split: tuple[int, int, int, int], perm: Sequence[int], bias: bool) -> Graph:
    """to_v's output read as `split`, permuted, times attention weights, permuted by `perm` again, merged, to_out."""
    net = Net(heads * dim)
    v = net.op("Reshape", net.linear("x", "to_v", bias=bias), net.param("s1", list(split)), name="attn/Reshape")
    v = net.op("Transpose", v, name="attn/Transpose", perm=list(perm))
    lead, keys = [split[perm[0]], split[perm[1]]], split[perm[2]]
    p = net.op("Softmax", net.given("scores", *lead, keys, keys), name="attn/Softmax", axis=-1)
    o = net.op("MatMul", p, v, name="attn/MatMul")
    o = net.op("Transpose", o, name="attn/Transpose_1", perm=[int(i) for i in np.argsort(perm)])
    o = net.op("Reshape", o, net.param("s2", [1, TOKENS, heads * dim]), name="attn/Reshape_1")
    return net.graph(net.linear(o, "to_out"))
