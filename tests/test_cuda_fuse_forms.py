"""The fusing rewrites on graphs of a few nodes: quantizers, linears, norms and rotations, and their limits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests import cuda_reference
from tests.cuda_forms import EXACT, B, C, T, built, feeds, fused, kinds, linear, only, quantized, skips
from tests.graphs import Builder, transformer
from vdq_export import ort
from vdq_export.graph import Array, Graph
from vdq_export.hadamard import matrix
from vdq_export.metrics import sqnr_db
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda._fused import held, operand
from vdq_export.targets.cuda.merge import merge

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
    first, other = ({"in.high": np.array(np.float32(0.2) * np.float32(top - 8))} for top in (15, 63))
    merged = merge(graph, [first, other])
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
    scale: Array = np.linspace(0.5, 2, C).astype(np.float32)
    y = rotated(make, "x", None, matrix(C) * scale)
    graph, _ = fused(built(make, {linear(make, quantized(make, y, "in"), "a"): (B, T, C)}))
    assert kinds(graph) == {"Normalize": 1, "Linear": 1}
    np.testing.assert_allclose(held(only(graph, "Normalize"), "post").values, scale, rtol=1e-5)


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
