"""The fusing rewrites on graphs of a few nodes: attention in its forms, embeddings, and what moves tokens."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.cuda_forms import B, C, H, T, built, fused, kinds, linear, only, quantized, skips
from tests.graphs import Builder
from vdq_export.targets.cuda._fused import held, operand

# -- attention -------------------------------------------------------------------------------------------------------


def heads(make: Builder, x: str, name: str, keys: bool = False) -> str:
    y = make.op("Reshape", x, make.param(f"{name}.shape", [B, T, H, C // H], "int64"), name=f"{name}/Reshape")
    return make.op("Transpose", y, name=name, perm=[0, 2, 3, 1] if keys else [0, 2, 1, 3])


def attention(make: Builder, q: str, k: str, v: str, mask: str = "", nan: bool = False, merged: bool = True) -> str:
    scores = make.op("MatMul", q, k, name="attn/MatMul")
    scores = make.op("Mul", scores, make.param("attn.scale", 0.3), name="attn/Mul")
    scores = make.op("Add", scores, mask, name="attn/Add") if mask else scores
    p = make.op("Softmax", scores, name="attn/Softmax", axis=-1)
    if nan:
        zero = make.param("attn.zero", 0.0)
        p = make.op("Where", make.op("IsNaN", p, name="attn/IsNaN"), zero, p, name="attn/Where")
    y = make.op("MatMul", p, v, name="attn/MatMul_1")
    if not merged:
        return y
    y = make.op("Transpose", y, name="attn/Transpose", perm=[0, 2, 1, 3])
    return make.op("Reshape", y, make.param("attn.merged", [B, T, C], "int64"), name="attn/Reshape")


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("mask", [(), (B, 1, 1, T), (1, H, T, T)])
def test_attention_that_is_written_out(mask: tuple[int, ...], nan: bool) -> None:
    make = Builder()
    values = make.random.normal(size=mask)
    bias = make.param("mask", np.where(values > 1, -np.inf, values)) if mask else ""
    y = attention(make, heads(make, "x", "q"), heads(make, "x", "k", keys=True), heads(make, "x", "v"), bias, nan)
    graph, _ = fused(built(make, {linear(make, quantized(make, y, "in"), "a"): (B, T, C)}))
    assert kinds(graph) == {"Attention": 1, "Linear": 1}
    node = only(graph, "Attention")
    assert (operand(node, "mask") is None) == (not mask)
    assert [value.name for value in node.inputs[:3]] == ["x", "x", "x"], "in front of the layout"
    assert node.attrs["scale"] == pytest.approx(0.3)


def test_an_unknown_layout_is_laid_back() -> None:
    make = Builder()
    q = make.op("Tanh", heads(make, "x", "q"), name="q/Tanh")
    k = make.op("Tanh", heads(make, "x", "k", keys=True), name="k/Tanh")
    y = attention(make, q, k, heads(make, "x", "v"), merged=False)
    graph, _ = fused(built(make, {y: (B, H, T, C // H)}))
    assert kinds(graph)["Attention"] == 1
    assert "Softmax" not in kinds(graph)


def test_constants_in_front_of_the_scores_are_its_scale() -> None:
    make = Builder()
    q = make.op("Mul", heads(make, "x", "q"), make.param("half", 0.5), name="q/Mul")
    y = attention(make, q, heads(make, "x", "k", keys=True), heads(make, "x", "v"))
    graph, _ = fused(built(make, {y: (B, T, C)}))
    assert kinds(graph) == {"Attention": 1}
    assert only(graph, "Attention").attrs["scale"] == pytest.approx(0.15)


@pytest.mark.parametrize("factor", [1.0, 0.5, -0.5])
def test_quantized_operands_of_attention_that_is_written_out(factor: float) -> None:
    make = Builder()

    def coded(value: str, name: str, scales: list[float], kind: Any = "int8") -> str:
        given = make.param(f"{name}.s", scales), make.param(f"{name}.z", np.zeros(H), kind)
        q = make.op("QuantizeLinear", value, *given, name=f"{name}/Q", axis=1)
        return make.op("DequantizeLinear", q, *given, name=f"{name}/DQ", axis=1)

    q = make.op("Mul", heads(make, "x", "q"), make.param("factor", factor), name="q/Mul")
    k = coded(heads(make, "x", "k", keys=True), "k", [0.02, 0.03])
    v = coded(heads(make, "x", "v"), "v", [0.01, 0.02], ml_dtypes.float8_e4m3fn)
    y = attention(make, coded(q, "q", [0.01, 0.02]), k, v)
    graph, _ = fused(built(make, {y: (B, T, C)}))
    assert kinds(graph) == {"Rope": 3, "Attention": 1}
    node = only(graph, "Attention")
    assert [np.dtype(value.dtype).name for value in node.inputs[:3]] == ["int8", "int8", "float8_e4m3fn"]
    assert held(node, "q_scale").shape == [H]


@pytest.mark.parametrize("axes", [[0], [1], [0, 1]])
def test_keys_that_samples_or_heads_share_stay_written_out(axes: list[int]) -> None:
    make = Builder()
    k = make.op("ReduceMean", heads(make, "x", "k", keys=True), make.param("axes", axes, "int64"), name="shared")
    graph, reports = fused(built(make, {attention(make, heads(make, "x", "q"), k, heads(make, "x", "v")): (B, T, C)}))
    assert "Attention" not in kinds(graph)
    assert "not those of heads" in skips(reports)


def test_one_scale_a_head_is_wanted() -> None:
    make = Builder()
    info = {"attn": (B, T, C)}
    scales = np.linspace(0.01, 0.02, C)
    given = make.param("s", scales), make.param("z", np.zeros(C), "int8")
    q = make.op("QuantizeLinear", "x", *given, name="Q", axis=2)
    q = make.op("DequantizeLinear", q, *given, name="DQ", axis=2)
    make.op("MultiHeadAttention", q, q, "x", name="attn", num_heads=H, domain="com.microsoft")
    graph, reports = fused(built(make, {make.op("Neg", "attn", name="y"): (B, T, C)}, info))
    assert kinds(graph)["QuantizeLinear"] == 1
    assert "different scales" in skips(reports)


# -- rotary embeddings and what moves tokens -------------------------------------------------------------------------


def cut(make: Builder, x: str, begin: int, end: int, name: str) -> str:
    ends = [make.param(f"{name}.{what}", [n], "int64") for what, n in (("from", begin), ("to", end), ("axis", 1))]
    return make.op("Slice", x, *ends, name=name)


def embedded(make: Builder, x: str, count: int, name: str) -> str:
    angles = np.random.default_rng(count).normal(size=(count, C // H // 2))
    tables = [make.param(f"{name}.{f.__name__}", f(angles)) for f in (np.cos, np.sin)]
    offset = make.param(f"{name}.offset", [0], "int64")
    return make.op("RotaryEmbedding", x, offset, *tables, name=name, domain="com.microsoft", interleaved=1)


@pytest.mark.parametrize("first", [True, False])
def test_an_embedding_of_some_tokens(first: bool) -> None:
    make = Builder()
    ends = ((0, 4), (4, T)) if first else ((2, T), (0, 2))
    turned = embedded(make, cut(make, "x", *ends[0], "video"), 4, "rope")
    parts = [turned, cut(make, "x", *ends[1], "text")]
    y = make.op("Concat", *(parts if first else parts[::-1]), name="all", axis=1)
    graph, _ = fused(built(make, {make.op("Neg", y, name="y"): (B, T, C)}, {"rope": (B, 4, C)}))
    assert kinds(graph) == {"Rope": 1, "Neg": 1}
    assert held(only(graph, "Rope"), "cos").shape == (T, C // H // 2)


def test_equal_angles_are_held_once() -> None:
    make = Builder()
    y = make.op("Add", embedded(make, "x", T, "q"), embedded(make, "x", T, "k"), name="sum")
    other = make.op("Neg", embedded(make, cut(make, "x", 0, 4, "cut"), 4, "other"), name="neg")
    info = {"q": (B, T, C), "k": (B, T, C), "other": (B, 4, C)}
    graph, _ = fused(built(make, {y: (B, T, C), other: (B, 4, C)}, info))
    tables = {id(operand(node, "cos")) for node in graph.nodes if node.op == "Rope"}
    assert (kinds(graph)["Rope"], len(tables)) == (3, 2)


@pytest.mark.parametrize("codes", [False, True])
def test_a_layer_norm_a_head_in_front_of_an_embedding(codes: bool) -> None:
    make = Builder()
    d = C // H
    apart = make.op("Reshape", "x", make.param("apart.shape", [B, T, H, d], "int64"), name="apart")
    affine = (make.param(name, make.random.normal(size=d)) for name in ("weight", "bias"))
    normed = make.op("LayerNormalization", apart, *affine, name="norm", axis=-1, epsilon=1e-3)
    flat = make.op("Reshape", normed, make.param("flat.shape", [B, T, C], "int64"), name="flat")
    y = embedded(make, flat, T, "rope")
    given = make.param("s", np.repeat([0.02, 0.03], d)), make.param("z", np.zeros(C), "int8")
    if codes:
        y = make.op(
            "DequantizeLinear", make.op("QuantizeLinear", y, *given, name="Q", axis=2), *given, name="DQ", axis=2
        )
        y = make.op("MultiHeadAttention", y, y, "x", name="attn", num_heads=H, domain="com.microsoft")
    info = {"rope": (B, T, C), "attn": (B, T, C)}
    graph, _ = fused(built(make, {make.op("Neg", y, name="y"): (B, T, C)}, info))
    nodes = [node for node in graph.nodes if node.op == "Rope"]
    assert kinds(graph) == ({"Rope": 1, "Attention": 1, "Neg": 1} if codes else {"Rope": 1, "Neg": 1})
    assert (nodes[0].attrs["norm"], held(nodes[0], "bias").shape) == ("layer_head", (d,))


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_cut_and_rejoined(whole: bool) -> None:
    make = Builder()
    parts = [
        cut(make, "x", 0, 2, "one"),
        cut(make, "x", 2, 4, "two"),
        cut(make, "x", 4, T if whole else T - 1, "three"),
    ]
    y = make.op("Neg", make.op("Concat", *parts, name="again", axis=1), name="y")
    graph, _ = fused(built(make, {y: (B, T if whole else T - 1, C)}))
    assert ("Concat" in kinds(graph)) != whole


def test_quantizers_in_front_of_what_moves() -> None:
    make = Builder()
    x = quantized(make, "x", "in")
    parts = [make.op("Gelu", linear(make, x, name), name=f"{name}/Gelu") for name in "ab"]
    y = make.op("Concat", *parts, name="both", axis=2)
    y = make.op("Reshape", y, make.param("shape", [B * T, 2 * C], "int64"), name="rows")
    graph, _ = fused(built(make, {linear(make, quantized(make, y, "mid"), "c", 2 * C): (B * T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 3, "Concat": 1, "Reshape": 1}
    assert all(node.inputs[0].dtype == np.int8 for node in graph.nodes if node.op in ("Concat", "Reshape"))


def test_the_table_holds_what_is_read() -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in", scale=0.2, zero=8, levels=16), "a")
    graph, reports = fused(built(make, {y: (B, T, C)}), ["in.low", "in.high"])
    row = only(graph, "Row")
    assert row.inputs[0].values.shape == (1, 8), "a scale and a zero point, each on 16 bytes"
    assert row.outputs[0].shape == [8]
    assert reports["trim_table"].applied == 1
