"""Rotation: what it must refuse, repeat and leave alone; other readers; what it says and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from tests.rotation_cases import explicit, fused, inserted, joint_net, layout_net, rotated, rotation_plan
from tests.smoothing_cases import EXACT, Net, attention_net, error, made_plan, norm_net
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.errors import PassError, PlanError
from vdq_export.graph import Array, Graph, transform_lazily
from vdq_export.passes import rotation
from vdq_export.plan import QuantPlan, Rotation


def with_rotation(plan: QuantPlan, layer: str, wanted: Rotation | None) -> QuantPlan:
    return made_plan([replace(x, rotation=wanted) if x.name == layer else x for x in plan.layers])


def two_readers(extra: str) -> Graph:
    """q reads what v's linear makes; so does `extra`: another linear, a residual, or the graph's caller."""
    net = Net(24)
    y = net.linear("x", "v")
    q = net.linear(y, "q")
    if extra == "linear":
        return net.graph(q, net.linear(y, "float", n=5))
    return net.graph(q, y) if extra == "output" else net.graph(net.op("Add", q, y, name="Residual/Add"))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    ("extra", "who"),
    [("linear", "read by float/MatMul"), ("residual", "read by Residual/Add"), ("output", "an output")],
)
def test_other_readers_keep_the_value(extra: str, who: str, smooth: bool) -> None:
    graph = two_readers(extra)
    kept = ("float",) if extra == "linear" else ()
    after, report = rotated(graph, rotation_plan(graph, kept=kept, only=("q",), smooth=smooth))
    assert error(graph, after) <= EXACT
    assert fused(report) == {}
    assert smooth or who in explicit(report)["v/Add"]
    assert not any("rotated" in x.weight.name for x in after.linears() if x.name != "q")


@pytest.mark.parametrize("order", [("rotation",), pipeline.FLOAT], ids=["rotation", "all"])
@pytest.mark.parametrize("graph", [attention_net(24, 2), norm_net(192, "affine"), joint_net(24, 2)])
def test_a_second_run_does_nothing(graph: Graph, order: tuple[str, ...]) -> None:
    plan = rotation_plan(graph, scaled=True, smooth=True)
    after, _ = rotated(graph, plan)
    once = after.hash()
    again = pipeline.run_passes(after, order, PassContext(plan=plan))
    assert [report.applied for report in again] == [0] * len(order)
    assert after.hash() == once


def test_a_saved_graph_is_still_known_as_rotated(tmp_path: Path) -> None:
    graph = attention_net(24, 2)
    plan = rotation_plan(graph, smooth=True)
    after, _ = rotated(graph, plan)
    after.save(tmp_path / "g.onnx")
    loaded = Graph.load(tmp_path / "g.onnx")
    assert [x.name for x in loaded.linears()] == [x.name for x in graph.linears()]
    assert [r.applied for r in pipeline.run_passes(loaded, pipeline.FLOAT, PassContext(plan=plan))] == [0, 0]
    onnx.checker.check_model(onnx.load(tmp_path / "g.onnx"), full_check=True)


@pytest.mark.parametrize("change", [{"block": 12}, {"scale": (2.0,) * 24}])
def test_another_rotation_on_top_is_refused(change: dict[str, object]) -> None:
    graph = norm_net(24, "affine")
    after, _ = rotated(graph, rotation_plan(graph))
    other = made_plan([
        replace(x, rotation=replace(x.rotation, **change)) if x.rotation else x for x in rotation_plan(graph).layers
    ])  # fmt: skip
    with pytest.raises(PassError, match="rotated in part or otherwise"):
        rotation.run(after, PassContext(plan=other))


def test_readers_that_disagree_are_refused() -> None:
    graph = norm_net(24, "affine")
    plan = rotation_plan(graph)
    for wanted in (None, Rotation(block=12, why="test"), Rotation(block=24, why="test", scale=(2.0,) * 24)):
        with pytest.raises(PassError, match="disagree on its rotation: q, k"):
            rotation.run(graph.copy(), PassContext(plan=with_rotation(plan, "k", wanted)))


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (Rotation(block=6, why=""), "no Hadamard blocks of 6 in 24 channels"),
        (Rotation(block=24, why="", scale=(0.0,) * 24), "finite scales above 0"),
        (Rotation(block=24, why="", scale=(float("inf"),) * 24), "finite scales above 0"),
    ],
)
def test_impossible_rotations_are_refused(wanted: Rotation, what: str) -> None:
    net = Net(24)
    graph = net.graph(net.linear("x", "q"))
    with pytest.raises(PlanError, match=what):
        rotation.run(graph, PassContext(plan=with_rotation(rotation_plan(graph), "q", wanted)))


def test_a_layer_the_graph_lacks_is_refused() -> None:
    graph = norm_net(24, "affine")
    plan = made_plan([replace(x, name=f"{x.name}.else") for x in rotation_plan(graph).layers])
    with pytest.raises(PlanError, match="which is no linear of the graph"):
        rotation.run(graph, PassContext(plan=plan))


def test_a_weight_that_two_layers_hold_is_turned_for_each() -> None:
    """Tied weights: one constant, read by a rotated and an unrotated linear, and by a producer."""
    net = Net(24)
    a = net.op("MatMul", net.linear("x", "in"), net.normal("tied", 24, 24), name="a/MatMul")
    b = net.op("MatMul", net.op("Gelu", a, name="Gelu"), "tied", name="b/MatMul")
    graph = net.graph(b, net.op("MatMul", net.op("Relu", b, name="Relu"), "tied", name="c/MatMul"))
    for only in (("a",), ("b",), ("a", "b"), ("a", "b", "c")):
        after, _ = rotated(graph, rotation_plan(graph, only=only))
        assert error(graph, after) <= EXACT


def test_rotation_products_are_no_linears() -> None:
    """One product over the whole width has a constant operand as a linear has; nobody may quantize it."""
    graph = norm_net(24, "affine")
    after, _ = rotated(graph, rotation_plan(graph))
    [product] = [n for n in after.nodes if "/Rotate" in n.name]
    assert product.op == "MatMul"
    assert product.inputs[1].shape == (1, 24, 24)
    assert [x.name for x in after.linears()] == ["q", "k"]
    assert after.attention_matmuls() == []


@pytest.mark.parametrize(("width", "block"), [(24, 24), (24, 12), (192, 192), (1536, 256)])
def test_the_cost_it_states_is_that_of_its_products(width: int, block: int) -> None:
    graph = norm_net(width, "affine")
    after, report = rotated(graph, rotation_plan(graph, block=block))
    count = 0
    for node in after.nodes:
        if "/Rotate" in node.name and node.op == "MatMul":
            count += int(np.prod(node.outputs[0].shape)) * node.inputs[0].shape[-1]
    assert report.details[-1] == f"multiplied a run: {count} times"
    assert f"{count} multiplications a run" in report.details[0]
    assert inserted(after)


def test_details_say_where_and_why() -> None:
    graph = attention_net(24, 2)
    _, report = rotated(graph, rotation_plan(graph))
    assert report.details[1] == "attn/Reshape_1: blocks of 12 fused into to_v for to_out"
    assert report.details[0].startswith(
        "x: blocks of 24 explicit, 2880 multiplications a run, for to_v; not fused: x is"
    )
    _, report = rotated(graph, rotation_plan(graph, smooth=True, scaled=True))
    assert report.details[1].endswith("fused into to_v for to_out; its channel scale costs 0 multiplications a run")


def test_weights_stay_promises() -> None:
    """No turned weight is held before somebody asks for it: the model would be in memory twice."""
    graph = attention_net(48, 2)
    after, _ = rotated(graph, rotation_plan(graph, smooth=True))
    assert [isinstance(x.weight._values, np.ndarray) for x in after.linears()] == [False, False]
    first = after.linears()[0].read_weight()
    assert first.dtype == np.float32
    assert not isinstance(after.linears()[0].weight._values, np.ndarray)


def test_promises_chain_and_keep_the_type() -> None:
    net = Net(12)
    graph = net.graph(net.linear("x", "q"))
    weight = graph.linears()[0].weight
    values = weight.values.copy()
    seen: list[tuple[int, ...]] = []

    def double(array: Array) -> Array:
        seen.append(array.shape)
        return np.asarray(array * np.float64(2.0))

    transform_lazily(weight, double)
    transform_lazily(weight, double)
    assert seen == []
    made = graph.linears()[0].read_weight()
    assert made.dtype == np.float32
    assert np.array_equal(made, 4 * values)
    assert seen == [(12, 12)] * 2


def test_interleaved_heads_are_not_taken_for_merged_ones() -> None:
    """[T, D, H] instead of [T, H, D]: twelve channels in a row belong to different heads."""
    graph = layout_net(4, 12, (1, 5, 12, 4), (0, 3, 1, 2), bias=True)
    after, report = rotated(graph, rotation_plan(graph, block=12, only=("to_out",)))
    assert "divides blocks" in explicit(report)["attn/Reshape_1"]
    assert error(graph, after) <= EXACT
    heads_first = layout_net(4, 12, (1, 5, 4, 12), (0, 2, 1, 3), bias=True)
    _, report = rotated(heads_first, rotation_plan(heads_first, block=12, only=("to_out",)))
    assert fused(report)
