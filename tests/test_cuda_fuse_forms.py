"""The fusing rewrites on graphs of a few nodes: forms that one family's blocks do not have, and their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests import cuda_reference
from tests.graphs import Builder, transformer
from vdq_export import ort
from vdq_export.contract import PassReport
from vdq_export.graph import Array, Graph, Node
from vdq_export.hadamard import matrix
from vdq_export.metrics import sqnr_db
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda._fused import operand
from vdq_export.targets.cuda.merge import merge

EXACT = 115.0  # dB; see test_cuda_fuse
B, T, C, H = 2, 6, 32, 2


Shapes = Mapping[str, Sequence[int]]


def built(make: Builder, outputs: Shapes, info: Shapes | None = None) -> Graph:
    """The graph of x[B, T, C] and mod[B, 1, C]. info: shapes that onnx does not infer."""

    def described(shapes: Shapes) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in shapes.items()]

    inputs = {"x": (B, T, C), "mod": (B, 1, C)}
    graph = helper.make_graph(
        make.nodes, "g", described(inputs), described(outputs), make.params, value_info=described(info or {})
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model))


def feeds() -> dict[str, Array]:
    random = np.random.default_rng(7)
    return {name: random.normal(size=s).astype(np.float32) for name, s in (("x", (B, T, C)), ("mod", (B, 1, C)))}


def quantized(
    make: Builder, x: str, name: str, scale: float = 0.03, zero: int = 120, kind: str = "uint8", levels: int = 0
) -> str:
    """DequantizeLinear(QuantizeLinear(x)), behind a Clip where there are fewer levels."""
    if levels:
        ends = [np.float32(scale) * np.float32(n - zero) for n in (0, levels - 1)]
        limits = [make.param(f"{name}.{end}", value) for end, value in zip(("low", "high"), ends, strict=True)]
        x = make.op("Clip", x, *limits, name=f"{name}/Clip")
    given = make.param(f"{name}.scale", scale), make.param(f"{name}.zero", zero, kind)
    return make.op(
        "DequantizeLinear", make.op("QuantizeLinear", x, *given, name=f"{name}/Q"), *given, name=f"{name}/DQ"
    )


def linear(make: Builder, x: str, name: str, k: int = C, n: int = C, bias: bool = True, kind: Any = np.int8) -> str:
    codes = make.param(f"{name}.codes", make.random.integers(-100, 100, (k, n)), kind)
    scales = make.param(f"{name}.scales", make.random.uniform(1e-3, 2e-3, n))
    weight = make.op("DequantizeLinear", codes, scales, name=f"{name}/Weight", axis=1)
    y = make.op("MatMul", x, weight, name=f"{name}/MatMul")
    return make.op("Add", y, make.weight(f"{name}.bias", n), name=f"{name}/Add") if bias else y


def fused(graph: Graph, varied: Sequence[str] = ()) -> tuple[Graph, dict[str, PassReport]]:
    """The graph with all rewrites done; it computes what it did, and twice is once. varied: constants of the bins."""
    expected = ort.run(graph, feeds(), exact=True)
    constants = {one.name: np.asarray(one.values) for one in graph.constants() if one.name in varied}
    merged = merge(graph, [constants])
    reports = {report.name: report for report in fuse.run(merged)}
    before = merged.hash()
    assert not any(report.applied for report in fuse.run(merged))
    assert merged.hash() == before
    given = feeds() | ({"bin": np.array([0])} if any(one.name == "bin" for one in merged.gs.inputs) else {})
    got = cuda_reference.run(
        merged.to_proto(), {k: v for k, v in given.items() if k in {i.name for i in merged.gs.inputs}}
    )
    assert got.keys() == expected.keys()
    assert min(sqnr_db(expected[name], got[name]) for name in got) > EXACT
    return merged, reports


def kinds(graph: Graph) -> dict[str, int]:
    """Operators but the bin's numbers."""
    return dict(Counter(node.op for node in graph.nodes if node.op not in ("Row", "Pick")))


def only(graph: Graph, op: str) -> Node:
    (node,) = [node for node in graph.nodes if node.op == op]
    return node


def skips(reports: Mapping[str, PassReport]) -> str:
    return "; ".join(skip.why for report in reports.values() for skip in report.skipped)


# -- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 120), ("uint8", 128), ("int8", 0), ("int8", -5)])
def test_codes_of_both_types(kind: str, zero: int) -> None:
    make = Builder()
    graph, _ = fused(built(make, {linear(make, quantized(make, "x", "in", zero=zero, kind=kind), "a"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 1}
    shifted = zero - 128 if kind == "uint8" else zero
    assert (operand(only(graph, "Linear"), "x_zero") is None) == (shifted == 0)


def test_sixteen_bits_are_dequantized_for_a_kernel_of_floats() -> None:
    make = Builder()
    graph, reports = fused(built(make, {linear(make, quantized(make, "x", "in", kind="uint16"), "a"): (B, T, C)}))
    assert {"QuantizeLinear", "DequantizeLinear", "Linear"} <= kinds(graph).keys()
    assert operand(only(graph, "Linear"), "x_scale") is None
    assert reports["fuse_linear"].applied == 1


def test_a_quantizer_that_others_read_stays_beside_its_kernel() -> None:
    make = Builder()
    x_hat = quantized(make, "x", "in")
    y = linear(make, x_hat, "a")
    graph, _ = fused(built(make, {y: (B, T, C), make.op("Neg", x_hat, name="also"): (B, T, C)}))
    assert kinds(graph)["QuantizeLinear"] == kinds(graph)["Normalize"] == 1


def test_other_parameters_on_the_way_back_are_no_round_trip() -> None:
    make = Builder()
    there = make.param("scale", 0.03), make.param("zero", 120, "uint8")
    back = make.param("scale.back", 0.04), make.param("zero.back", 120, "uint8")
    q = make.op("QuantizeLinear", "x", *there, name="Q")
    graph, _ = fused(built(make, {linear(make, make.op("DequantizeLinear", q, *back, name="DQ"), "a"): (B, T, C)}))
    assert kinds(graph) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Linear": 1, "Cast": 2, "Add": 2}


def test_levels_that_differ_between_bins_keep_their_clip() -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in", scale=0.2, zero=8, levels=16), "a")
    graph = built(make, {y: (B, T, C)})
    other = {"in.high": np.float32(0.2) * np.float32(63 - 8)}
    merged = merge(graph, [{"in.high": np.float32(0.2) * np.float32(7)}, other])
    reports = fuse.run(merged)
    assert kinds(merged) == {"Clip": 1, "Normalize": 1, "Linear": 1}
    node = only(merged, "Normalize")
    assert (node.attrs["low_level"], node.attrs["high_level"]) == (-128, 127)
    for number, changed in enumerate(({}, other)):
        one = graph.copy()
        for constant in one.constants():
            if constant.name in changed:
                constant.values = np.asarray(changed[constant.name])
        expected = ort.run(one, feeds(), exact=True)[y]
        got = cuda_reference.run(merged.to_proto(), feeds() | {"bin": np.array([number])})[y]
        assert sqnr_db(expected, got) > EXACT
    assert all(not report.skipped for report in reports)


def test_two_quantizers_with_the_same_numbers_are_one() -> None:
    make = Builder()
    first, second, other = (
        linear(make, quantized(make, "x", name, scale), f"{name}.linear")
        for name, scale in (("a", 0.03), ("b", 0.03), ("c", 0.04))
    )
    graph, _ = fused(built(make, {first: (B, T, C), second: (B, T, C), other: (B, T, C)}))
    assert kinds(graph) == {"Normalize": 2, "Linear": 3}


# -- linears ---------------------------------------------------------------------------------------------------------


def test_what_no_kernel_takes_stays_as_it_is() -> None:
    make = Builder()
    zeros = make.param("a.zeros", np.arange(C) % 3, "int8")
    codes = make.param("a.codes", make.random.integers(-9, 9, (C, C)), "int8")
    scales = make.param("a.scales", np.full(C, 0.01))
    weight = make.op("DequantizeLinear", codes, scales, zeros, name="a/Weight", axis=1)
    y = make.op("MatMul", quantized(make, "x", "in"), weight, name="a/MatMul")
    graph, reports = fused(built(make, {y: (B, T, C)}))
    assert kinds(graph)["MatMul"] == 1
    assert "zero points" in skips(reports)


def test_float8_weights_want_float8_codes() -> None:
    make = Builder()
    graph, reports = fused(built(make, {linear(make, "x", "a", kind=ml_dtypes.float8_e4m3fn): (B, T, C)}))
    assert kinds(graph) == {"DequantizeLinear": 1, "MatMul": 1, "Add": 1}
    assert "float8 weights multiply float8 codes only" in skips(reports)


@pytest.mark.parametrize("approximate", ["none", "tanh", "silu"])
def test_activations(approximate: str) -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in"), "a")
    if approximate == "silu":
        y = make.op("Mul", y, make.op("Sigmoid", y, name="Sigmoid"), name="act")
    else:
        y = make.op("Gelu", y, name="act", approximate=approximate)
    graph, _ = fused(built(make, {linear(make, quantized(make, y, "mid"), "b"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 2}


def test_a_gated_ffn() -> None:
    """silu(gate) · up: the gate of one linear is what the other put out, a row a token."""
    make = Builder()
    x = quantized(make, "x", "in")
    gate, up = linear(make, x, "gate"), linear(make, x, "up")
    gate = make.op("Mul", gate, make.op("Sigmoid", gate, name="Sigmoid"), name="silu")
    y = linear(make, quantized(make, make.op("Mul", gate, up, name="product"), "mid"), "down")
    graph, _ = fused(built(make, {y: (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 3}


def test_a_step_that_others_read_ends_the_epilogue() -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in"), "a")
    gated = make.op("Mul", make.op("Gelu", y, name="Gelu"), "mod", name="gated")
    graph, _ = fused(built(make, {gated: (B, T, C), make.op("Neg", y, name="also"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 1, "Gelu": 1, "Mul": 1, "Neg": 1}


def test_an_output_of_the_graph_stays() -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in"), "a")
    graph, _ = fused(built(make, {y: (B, T, C), make.op("Gelu", y, name="Gelu"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 1, "Gelu": 1}


@pytest.mark.parametrize("shape", [(T, 1), (1, T, C), (B, T, 1)])
def test_a_factor_that_is_no_row_a_sample_stays(shape: tuple[int, ...]) -> None:
    make = Builder()
    y = linear(make, quantized(make, "x", "in"), "a")
    graph, _ = fused(built(make, {make.op("Mul", y, make.weight("factor", *shape), name="scaled"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 1, "Mul": 1}


# -- norms and rotations ---------------------------------------------------------------------------------------------


def rotated(make: Builder, x: str, left: Array | None, right: Array) -> str:
    q = len(right)
    shape = [B * T * C // q, q] if left is None else [B * T, len(left), q]
    shape = [B * T, C // q, q] if left is None else shape
    y = make.op("Reshape", x, make.param("blocks", shape, "int64"), name="blocked")
    y = make.op("MatMul", y, make.param("right", right[None]), name="right/MatMul")
    if left is not None:
        y = make.op("MatMul", make.param("left", left.T[None]), y, name="left/MatMul")
    return make.op("Reshape", y, make.param("back", [B, T, C], "int64"), name="back/Reshape")


@pytest.mark.parametrize(("left", "right"), [(None, 8), (None, 32), (4, 8), (2, 16)])
def test_rotations_of_one_and_two_factors(left: int | None, right: int) -> None:
    make = Builder()
    y = rotated(make, "x", None if left is None else matrix(left), matrix(right))
    graph, reports = fused(built(make, {linear(make, quantized(make, y, "in"), "a"): (B, T, C)}))
    if left is None:
        assert kinds(graph) == {"Normalize": 1, "Linear": 1}
        assert only(graph, "Normalize").attrs["hadamard"] == right
    else:  # not the two factors that the kernel's matrix has
        assert "Hadamard" in skips(reports)


def test_a_rotation_with_a_channel_scale() -> None:
    make = Builder()
    scale = np.linspace(0.5, 2, C).astype(np.float32)
    graph, _ = fused(
        built(make, {linear(make, quantized(make, rotated(make, "x", None, matrix(C) * scale), "in"), "a"): (B, T, C)})
    )
    assert kinds(graph) == {"Normalize": 1, "Linear": 1}
    np.testing.assert_allclose(operand(only(graph, "Normalize"), "post").values, scale, rtol=1e-5)


@pytest.mark.parametrize("fault", ["sign", "order", "rows"])
def test_a_matrix_that_is_almost_one_is_none(fault: str) -> None:
    make, found = Builder(), matrix(C).copy()
    if fault == "sign":
        found[3, 5] *= -1
    elif fault == "order":
        found[[0, 1]] = found[[1, 0]]
    else:
        found *= np.linspace(0.5, 2, C)[:, None]
    y = rotated(make, "x", None, found)
    graph, reports = fused(built(make, {linear(make, quantized(make, y, "in"), "a"): (B, T, C)}))
    assert kinds(graph)["MatMul"] == 1
    assert "no Hadamard matrix" in skips(reports)


def test_a_norm_read_twice_is_not_modulated_in_its_kernel() -> None:
    make = Builder()
    v = make.op("LayerNormalization", "x", make.weight("w", C), name="norm", axis=-1)
    one = make.op("Mul", v, "mod", name="one")
    graph, _ = fused(
        built(
            make, {linear(make, quantized(make, one, "in"), "a"): (B, T, C), make.op("Neg", v, name="also"): (B, T, C)}
        )
    )
    assert kinds(graph) == {"Normalize": 2, "Mul": 1, "Neg": 1, "Linear": 1}


def test_a_norm_over_another_axis_stays() -> None:
    make = Builder()
    y = make.op("LayerNormalization", "x", make.weight("w", T, C), name="norm", axis=1)
    graph, _ = fused(built(make, {y: (B, T, C)}))
    assert kinds(graph) == {"LayerNormalization": 1}


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
    assert operand(node, "q_scale").shape == [H]


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
    assert operand(only(graph, "Rope"), "cos").shape == (T, C // H // 2)


def test_equal_angles_are_held_once() -> None:
    make = Builder()
    y = make.op("Add", embedded(make, "x", T, "q"), embedded(make, "x", T, "k"), name="sum")
    other = make.op("Neg", embedded(make, cut(make, "x", 0, 4, "cut"), 4, "other"), name="neg")
    info = {"q": (B, T, C), "k": (B, T, C), "other": (B, 4, C)}
    graph, _ = fused(built(make, {y: (B, T, C), other: (B, 4, C)}, info))
    tables = {id(operand(node, "cos")) for node in graph.nodes if node.op == "Rope"}
    assert (kinds(graph)["Rope"], len(tables)) == (3, 2)


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


# -- graphs that none of this concerns -------------------------------------------------------------------------------


def test_other_graphs_stay_as_they_are() -> None:
    graph = Graph.from_proto(transformer(2))
    before = graph.hash()
    reports = fuse.run(graph)
    assert graph.hash() == before
    assert not any(report.applied for report in reports)


@pytest.mark.parametrize("rewrite", fuse.REWRITES, ids=lambda rewrite: rewrite.NAME)
def test_every_rewrite_says_what_it_does(rewrite: Any) -> None:
    assert rewrite.__doc__
    assert "->" in rewrite.__doc__
    assert "Exact" in rewrite.__doc__
    assert rewrite.__name__.endswith(f".{rewrite.NAME}")
