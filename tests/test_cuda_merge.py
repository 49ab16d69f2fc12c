"""All bins in one graph: each row of the table computes, to the last bit, what its own graph did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from vdq_export.errors import PassError
from vdq_export.graph import Graph
from vdq_export.runtime import families
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.merge import merge
from vdq_export.targets.cuda.ops import BIN, DOMAIN

Array = np.ndarray[Any, Any]
SCALES, ZEROS = (0.5, 0.03, 0.25), (0, 77, 255)


def graph(
    scale: float, zero: int, *, offset: float = 1.0, dtype: str = "uint8", smooth: float = 1.0
) -> onnx.ModelProto:
    """y = Dequantize(Quantize(x · smooth[4])) + offset, one quantizer a bin."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    constants = [
        onnx.numpy_helper.from_array(np.array(scale, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.array(zero, dtype), "zero"),
        onnx.numpy_helper.from_array(np.array(offset, np.float32), "offset"),
        onnx.numpy_helper.from_array(np.full(4, smooth, np.float32), "smooth"),
    ]
    nodes = [
        helper.make_node("Mul", ["x", "smooth"], ["a"], name="a"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
        helper.make_node("Add", ["d", "offset"], ["y"], name="y"),
    ]
    info = helper.make_tensor_value_info
    values = [info("a", TensorProto.FLOAT, [2, 4]), info("q", kind, [2, 4]), info("d", TensorProto.FLOAT, [2, 4])]
    ends = [info("x", TensorProto.FLOAT, [2, 4])], [info("y", TensorProto.FLOAT, [2, 4])]
    made = helper.make_graph(nodes, "g", *ends, constants, value_info=values)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(folder: Path, protos: list[onnx.ModelProto]) -> list[Path]:
    paths = [folder / f"{number}.onnx" for number in range(len(protos))]
    for proto, path in zip(protos, paths, strict=True):
        onnx.save(proto, path)
    return paths


def merged(paths: list[Path]) -> Graph:
    (family,) = families.find(paths)
    return merge(Graph.load(paths[0]), [family.constants[index] for index in family.bins])


def run(graph: Graph, row: int, x: Array) -> Array:
    program = lower(graph.to_proto(), dtype=torch.float32)
    found: Array = program({"x": torch.from_numpy(x), BIN: torch.tensor([row])})["y"].numpy()
    return found


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_each_row_computes_what_its_graph_did(tmp_path: Path, dtype: str) -> None:
    zeros = [zero - 128 if dtype == "int8" else zero for zero in ZEROS]
    protos = [
        graph(scale, zero, smooth=1 + row, dtype=dtype)
        for row, (scale, zero) in enumerate(zip(SCALES, zeros, strict=True))
    ]
    whole = merged(saved(tmp_path, protos))
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for row, proto in enumerate(protos):
        expected = lower(proto, dtype=torch.float32)({"x": torch.from_numpy(x)})["y"].numpy()
        np.testing.assert_array_equal(run(whole, row, x), expected)
    assert not np.array_equal(run(whole, 0, x), run(whole, 1, x))  # rows do differ


def test_quantizers_are_picked_even_where_bins_agree_and_other_constants_stay(tmp_path: Path) -> None:
    whole = merged(saved(tmp_path, [graph(0.5, 3), graph(0.5, 3)]))
    picks = [node for node in whole.nodes if node.domain == DOMAIN and node.op == "Pick"]
    assert {node.name for node in picks} == {"scale.picked", "zero.picked"}
    assert {"offset", "smooth"} <= {one.name for one in whole.constants()}
    one = merged(saved(tmp_path, [graph(0.5, 3)]))
    assert [node.op for node in one.nodes].count("Pick") == 2


def test_the_table_is_aligned_and_zero_points_are_shifted(tmp_path: Path) -> None:
    whole = merged(saved(tmp_path, [graph(s, z) for s, z in zip(SCALES, ZEROS, strict=True)]))
    table = next(one.values for one in whole.constants() if one.name == "bins")
    offsets = {node.name: int(node.attrs["offset"]) for node in whole.nodes if node.op == "Pick"}
    assert all(offset % 4 == 0 for offset in offsets.values())
    np.testing.assert_array_equal(table[:, offsets["zero.picked"]], np.array(ZEROS) - 128.0)
    np.testing.assert_array_equal(table[:, offsets["scale.picked"]], np.array(SCALES, np.float32))


def test_the_graph_given_is_not_edited_and_a_second_merge_writes_the_same(tmp_path: Path) -> None:
    paths = saved(tmp_path, [graph(0.5, 3), graph(0.25, 4)])
    given = Graph.load(paths[0])
    before = given.to_proto().SerializeToString(deterministic=True)
    (family,) = families.find(paths)
    rows = [family.constants[index] for index in family.bins]
    first, second = (merge(given, rows).to_proto().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second and given.to_proto().SerializeToString(deterministic=True) == before


def test_integers_that_float32_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = Graph.from_proto(graph(0.5, 3))
    made.gs.nodes[3].inputs[1] = made.constant("large", np.array(2**24 + 1, np.int32))
    with pytest.raises(PassError, match="large differs between bins and does not fit"):
        merge(made, [{"large": np.array(2**24 + 1, np.int32)}, {"large": np.array(5, np.int32)}])
