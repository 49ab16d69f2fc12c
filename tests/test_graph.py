"""Graph's own promises: weights are mapped, given back, and multiplied only when somebody reads them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.smoothing_cases import Net
from vdq_export.graph import Graph, multiply_lazily, release
from vdq_export.ort import run


@pytest.mark.parametrize("mode", ["r", "c"])
def test_released_pages_read_the_same(tmp_path: Path, mode: str) -> None:
    """Also through a transposed view; and what was written to a private mapping is not lost."""
    path = tmp_path / "weights.bin"
    np.arange(1 << 16, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, mode, shape=(256, 256))
    if mode == "c":
        mapped[3, 4] = -1.0
    before = np.array(mapped)
    release(mapped.T)
    np.testing.assert_array_equal(mapped, before)
    release(np.ones(3))  # no mapping: nothing to do


def one_linear() -> Graph:
    net = Net(3)
    return net.graph(net.linear(net.given("x", 2, 3), "layer", 3, 5))


def test_a_lazy_product_is_made_anew_for_each_reader() -> None:
    graph = one_linear()
    (linear,) = graph.linears()
    original, factor = np.array(linear.weight.values), np.array([[1.0], [2.0], [-3.0]], np.float32)
    multiply_lazily(linear.weight, factor)
    multiply_lazily(linear.weight, factor)
    np.testing.assert_array_equal(linear.read_weight(), original * factor * factor)
    assert linear.read_weight() is not linear.read_weight()
    assert linear.shape == (3, 5)
    x = np.ones((2, 3), np.float32)
    bias = linear.bias.values if linear.bias is not None else 0
    (result,) = run(graph, {"x": x}).values()
    np.testing.assert_allclose(result, x @ (original * factor * factor) + bias, rtol=1e-5)  # a sum of 3 products


def test_fresh_names_never_repeat() -> None:
    graph = one_linear()
    names = [graph.fresh("layer/MatMul") for _ in range(3)]
    assert len({*names, "layer/MatMul"}) == 4


@pytest.mark.parametrize("name", ["float8_e4m3fn", "bfloat16", "int4"])
def test_a_small_constant_of_a_type_that_numpy_lacks_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    values = np.array([1, -2, 3], np.float32).astype(getattr(ml_dtypes, name))
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["constant"], ["y"], name="n")], "g", [],
        [onnx.helper.make_tensor_value_info("y", kind, [3])], [onnx.numpy_helper.from_array(values, "constant")],
    )  # fmt: skip
    path = tmp_path / "small.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), path)
    read = Graph.load(path)
    (found,) = read.constants()
    assert found.values.dtype == values.dtype and (found.values.view("u1") == values.view("u1")).all()
    again = onnx.numpy_helper.to_array(read.to_proto().graph.initializer[0])
    assert again.dtype == values.dtype and (again.view("u1") == values.view("u1")).all()
