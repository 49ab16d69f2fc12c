"""Cutting QDQ graphs at blocks: the parts in a row compute what the whole does, bit for bit, and integers cross."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from tests.qnn_cases import blocks
from vdq_export.errors import CompileError
from vdq_export.graph import Array
from vdq_export.targets.qnn import ARCHS, partition
from vdq_export.targets.qnn.contexts import SOCS


def run(model: ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    onnx.checker.check_model(model)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    chosen = {one.name: feeds[one.name] for one in session.get_inputs()}
    return dict(zip(names, session.run(names, chosen), strict=True))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_parts_in_a_row_equal_the_whole(parts: int) -> None:
    whole, feeds = blocks(4)
    values = dict(feeds)
    made = partition.split(whole, parts)
    assert len(made) == parts
    for part in made:
        values |= run(part, values)
    (name,) = (one.name for one in whole.graph.output)
    assert np.array_equal(values[name], run(whole, feeds)[name])


def test_boundaries_are_blocks_and_integers_with_equal_scales() -> None:
    whole, _ = blocks(4)
    assert partition.boundaries(whole) == ["blocks.0", "blocks.1", "blocks.2"]
    parts = partition.split(whole, 3)
    outside = {one.name for one in (*whole.graph.input, *whole.graph.output)}
    for part in parts:
        for one in (*part.graph.input, *part.graph.output):
            assert one.name in outside or one.type.tensor_type.elem_type == TensorProto.UINT16
    crossing = partition.boundary_scales(parts)
    # Two residual streams behind the cuts, and the timestep's value, which every block reads.
    assert sorted(crossing) == ["blocks.0/Add_1/Q", "blocks.2/Add_1/Q", "embed/Mul/Q"]
    assert all(len(set(encodings)) == 1 for encodings in crossing.values())


def test_every_weight_is_in_one_part() -> None:
    whole, _ = blocks(4)
    names = [one.name for part in partition.split(whole, 4) for one in part.graph.initializer if "weight" in one.name]
    assert sorted(names) == sorted(one.name for one in whole.graph.initializer if "weight" in one.name)
    assert len(names) == len(set(names))


def test_other_scales_behind_the_cut_are_refused() -> None:
    whole, _ = blocks(2)
    for node in whole.graph.node:
        if node.name == "blocks.0/Add_1/DQ":
            node.input[1] = "embed/Mul.s"
    with pytest.raises(CompileError, match=r"blocks.0/Add_1/Q is made with .* and read with embed/Mul.s"):
        partition.split(whole, 2)


def test_a_float_value_that_would_cross_is_refused() -> None:
    whole, _ = blocks(2)
    for node in whole.graph.node:
        node.input[:] = ["blocks.0/Add_1" if name == "blocks.0/Add_1/DQ" else name for name in node.input]
    with pytest.raises(CompileError, match=r"blocks\.0/Add_1 would cross a cut in float"):
        partition.split(whole, 2)


@pytest.mark.parametrize("parts", [0, 3])
def test_more_parts_than_blocks_are_refused(parts: int) -> None:
    with pytest.raises(CompileError, match=f"cannot be cut into {parts} parts.*it has 2 blocks"):
        partition.split(blocks(2)[0], parts)


def test_parts_weigh_about_the_same() -> None:
    whole, _ = blocks(8)
    sizes = [
        sum(numpy_helper.to_array(one).nbytes for one in part.graph.initializer) for part in partition.split(whole, 4)
    ]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ([1, 1, 1, 1], 2, [0, 0, 1, 1]),
        ([9, 1, 1, 1], 2, [0, 1, 1, 1]),
        ([1, 1, 1, 9], 2, [0, 0, 0, 1]),
        ([9, 1, 1], 3, [0, 1, 2]),
        ([1, 1, 9], 3, [0, 1, 2]),
        ([5], 1, [0]),
    ],
)
def test_no_part_is_empty(sizes: list[int], parts: int, expected: list[int]) -> None:
    assert partition._even(sizes, parts) == expected


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.7.attn1.to_q/MatMul", "blocks.7"),
        ("transformer_blocks.11/Add_3", "transformer_blocks.11"),
        ("unet.down_blocks.1.resnets.0/Conv", "down_blocks.1"),
        ("model.layers.3.mlp.layers.0/MatMul", "layers.3"),
        ("proj_out/MatMul", None),
        ("Add_1", None),
    ],
)
def test_blocks_are_found_by_module_path(name: str, block: str | None) -> None:
    assert partition._block(onnx.NodeProto(op_type="MatMul", name=name)) == block


def test_every_architecture_has_a_chip() -> None:
    assert set(SOCS) == set(ARCHS)
