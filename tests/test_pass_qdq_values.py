"""qdq_values on a small graph whose every number can be followed: against numpy from the definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph
from vdq_export.passes import qdq_values
from vdq_export.plan import INT_RANGE, Bin, ConstantPlan, Conversion, QuantPlan, Range, ValuePlan
from vdq_export.recipe import Recipe

BINS = (Bin(index=0, t=(0.0, 500.0), steps=(250.0,)), Bin(index=1, t=(500.0, 1000.0), steps=(750.0,)))
WEIGHT = np.random.default_rng(1).normal(size=(3, 2, 1, 1)).astype(np.float32)
BIAS, TABLE = np.array([0.5, -1.0, 2.0], np.float32), np.array([[0.25, -0.5, 1.0]], np.float32)


def graph() -> Graph:
    """y = Reshape(Conv(x, w, b)) · table, and z = s·sᵀ of the same s = Reshape(…): two outputs, four values."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["conv/Conv"], name="conv/Conv"),
        helper.make_node("Reshape", ["conv/Conv", "shape"], ["Reshape"], name="Reshape"),
        helper.make_node("Mul", ["Reshape", "table"], ["y"], name="Mul"),
        helper.make_node("Transpose", ["Reshape"], ["Transpose"], name="Transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["Reshape", "Transpose"], ["z"], name="MatMul"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 2, 1, 1])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, n]) for name, n in (("y", 3), ("z", 4))],
        [
            numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(BIAS, "b"),
            numpy_helper.from_array(TABLE, "table"), numpy_helper.from_array(np.array([4, 3]), "shape"),
        ],
    )  # fmt: skip
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(proto))


def ranges(low: float, high: float, dtype: str) -> tuple[Range, ...]:
    """One a bin; the second bin's is twice as wide."""
    least, most = INT_RANGE[dtype]
    found = []
    for wider in (1.0, 2.0):
        if dtype == "int16":
            scale, zero = float(np.float32(max(-low, high) * wider / most)), 0
        else:
            scale = float(np.float32((high - low) * wider / (most - least)))
            zero = least + round(-low * wider / scale)
        found.append(Range(lo=low * wider, hi=high * wider, scale=scale, zero_point=zero, why="test"))
    return tuple(found)


def plan(dtype: Any = "uint16") -> QuantPlan:
    def value(name: str, reach: float, *conversions: Conversion) -> ValuePlan:
        return ValuePlan(
            name=name, dtype=dtype, ranges=ranges(-reach, reach, dtype), why="test", conversions=conversions
        )

    second = Conversion(dtype="int16", ranges=ranges(-9, 9, "int16"), readers=("MatMul",), why="test")
    weight = tuple((np.abs(WEIGHT).max(axis=(1, 2, 3)) / 127).astype(np.float32).tolist())
    table = ranges(-0.5, 1.0, "uint8")[0]
    return QuantPlan(
        model="test", graph_hash="", target="qnn", recipe=Recipe(name="test", summary="test"), bins=BINS, layers=(),
        bins_why="test",
        values=(
            value("x", 4.0), value("conv/Conv", 8.0), value("Reshape", 8.0), value("y", 8.0),
            value("Transpose", 8.0, second), value("z", 90.0),
        ),
        constants=(
            ConstantPlan(name="w", dtype="int8", axis=0, scale=weight, readers=("conv/Conv",), why="test"),
            ConstantPlan(name="b", dtype="int32", readers=("conv/Conv",), why="test"),
            ConstantPlan(
                name="table", dtype="uint8", scale=(table.scale,), zero_point=table.zero_point, readers=("Mul",),
                why="test",
            ),
        ),
    )  # fmt: skip


def rounded(x: Array, chosen: Range, dtype: str) -> Array:
    low, high = INT_RANGE[dtype]
    scale = np.float32(chosen.scale)
    return ((np.clip(np.rint(x / scale) + chosen.zero_point, low, high) - chosen.zero_point) * scale).astype(np.float32)


def expected(x: Array, place: int, dtype: str) -> tuple[Array, Array]:
    """The definitions, step by step, in float64 between the roundings."""
    made = plan(dtype)
    own = {one.name: one.ranges[place] for one in made.values}
    scale = np.array(made.constants[0].scale, np.float32)
    weight = np.rint(WEIGHT[:, :, 0, 0] / scale[:, None]) * scale[:, None].astype(np.float64)
    grid = np.float32(own["x"].scale) * scale
    bias = np.rint(BIAS / grid.astype(np.float64)) * grid
    s = rounded(rounded(x[:, :, 0, 0], own["x"], dtype) @ weight.T + bias, own["conv/Conv"], dtype)
    s = rounded(s, own["Reshape"], dtype)
    table = made.constants[2]
    t = rounded(TABLE, Range(lo=0, hi=0, scale=table.scale[0], zero_point=table.zero_point, why=""), "uint8")
    turned = rounded(rounded(s.T, own["Transpose"], dtype), ranges(-9, 9, "int16")[place], "int16")
    return rounded(s * t, own["y"], dtype), rounded(s.astype(np.float64) @ turned, own["z"], dtype)


@given(place=st.integers(0, 1), dtype=st.sampled_from(["uint8", "uint16"]), seed=st.integers(0, 30))
def test_outputs_are_the_definitions(place: int, dtype: str, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(4, 2, 1, 1)).astype(np.float32)
    made = graph()
    qdq_values.run(made, PassContext(plan(dtype), BINS[place]))
    found = ort.run(made, {"x": x}, options={"session.disable_quant_qdq": "1"})
    for (name, output), reach in zip(found.items(), (8.0, 90.0), strict=True):
        step = ranges(-reach, reach, dtype)[place].scale
        wanted = expected(x, place, dtype)[("y", "z").index(name)]
        # float32 sums may fall on the other side of a rounding boundary, here and in values before: one step each.
        assert np.abs(output - wanted).max() <= 2.01 * step
        assert np.mean(np.abs(output - wanted) > 0.01 * step) < 0.2


def test_types_shapes_and_names() -> None:
    made = graph()
    qdq_values.run(made, PassContext(plan(), BINS[0]))
    proto = made.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [v.name for v in proto.graph.input] == ["x"]
    assert [v.name for v in proto.graph.output] == ["y", "z"]
    kinds = {t.name: t.data_type for t in proto.graph.initializer}
    assert kinds["w.int8"] == TensorProto.INT8
    assert kinds["b.int32"] == TensorProto.INT32
    scales = [t for t in proto.graph.initializer if t.name.endswith(".scale")]
    assert {tuple(t.dims) for t in scales} == {(), (3,)}, "per tensor scales have no dimension"
    product = next(n for n in made.nodes if n.name == "MatMul")
    codes = [operand.inputs[0].inputs[0].dtype for operand in product.inputs]
    assert codes == [np.uint16, np.int16]


def test_a_second_run_changes_nothing() -> None:
    made, context = graph(), PassContext(plan(), BINS[1])
    assert qdq_values.run(made, context).applied == 9
    once = made.to_proto().SerializeToString(deterministic=True)
    assert qdq_values.run(made, context).applied == 0
    assert made.to_proto().SerializeToString(deterministic=True) == once


def test_nothing_without_values() -> None:
    made = graph()
    before = made.to_proto().SerializeToString(deterministic=True)
    report = qdq_values.run(made, PassContext(replace(plan(), values=(), constants=()), BINS[0]))
    assert report.applied == 0
    assert made.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"values": (replace(p.values[0], name="gone"), *p.values[1:])}, "quantizes gone, which the graph"),
        (lambda p: {"constants": (replace(p.constants[2], name="x"),)}, "x is no constant"),
        (lambda p: {"constants": (replace(p.constants[2], readers=("conv/Conv",)),)}, "conv/Conv reads table"),
        (lambda p: {"constants": p.constants[1:]}, "b: input and weight of conv/Conv are not quantized"),
    ],
)
def test_a_plan_of_another_graph_is_refused(change: Any, message: str) -> None:
    whole = plan()
    with pytest.raises(PlanError, match=message):
        qdq_values.run(graph(), PassContext(replace(whole, **change(whole)), BINS[0]))
