"""Ranges of every value: what is observed, what each operator's bits make of it, and how constants are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from tests.planning import solved
from vdq_export import pipeline, targets
from vdq_export import recipe as recipes
from vdq_export.calib.constants import plan_constants
from vdq_export.calib.observe import observe
from vdq_export.calib.values import Extremes, float_values, observe_values, plan_values
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.plan import ConstantPlan, QuantPlan, ValuePlan
from vdq_export.recipe import Keep, Override, Recipe

SPEC = targets.load("qnn").spec()


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.canonical("qnn"), PassContext(spec=SPEC))
    return graph


@pytest.fixture(scope="module")
def record(canonical: Graph, tiny: Model) -> Any:
    return observe(canonical, tiny)


def planned(canonical: Graph, record: Any, tiny: Model, recipe: Recipe, tsw: int = 2) -> tuple[QuantPlan, Extremes]:
    [(graph, made)] = solved(canonical, record, recipe, SPEC, tsw=tsw)
    extremes = observe_values(graph, tiny)
    return plan_values(made.plan, graph, extremes, SPEC), extremes


def sixteen(**changes: Any) -> Recipe:
    method = recipes.load("static-minmax")
    return replace(method, activations=replace(method.activations, bits=16), **changes)


@pytest.fixture(scope="module")
def plan(canonical: Graph, record: Any, tiny: Model) -> QuantPlan:
    return planned(canonical, record, tiny, sixteen())[0]


def of(plan: QuantPlan, name: str) -> ValuePlan:
    return next(one for one in plan.values if one.name == name)


def test_extremes_are_those_of_the_module_itself(traced: Graph, tiny: Model) -> None:
    """Against torch: what the patch embedding puts out, call by call."""
    seen: dict[float, tuple[float, float]] = {}
    keep: list[torch.Tensor] = []
    hook = tiny.module.patch_embedding.register_forward_hook(lambda _m, _i, output: keep.append(output))
    with torch.no_grad():
        for trajectory in tiny.iter_trajectories():
            for step in trajectory:
                tiny.module(**step["inputs"])
                low, high = seen.get(step["t"], (np.inf, -np.inf))
                seen[step["t"]] = min(low, float(keep[-1].min())), max(high, float(keep[-1].max()))
    hook.remove()
    found = observe_values(traced, tiny)
    for slot in found.slots:
        name = next(n for n in found.values if n.startswith("patch_embedding/Conv"))
        by_t = [found.values[name][one] for one in found.slots if one.t == slot.t]
        np.testing.assert_allclose((min(b[0] for b in by_t), max(b[1] for b in by_t)), seen[slot.t], rtol=1e-4)


def test_every_float_value_has_a_range_in_every_bin(plan: QuantPlan, canonical: Graph) -> None:
    assert {one.name for one in plan.values} == {value.name for value in float_values(canonical)}
    assert all(len(one.ranges) == len(plan.bins) == 2 for one in plan.values)
    assert all(len(c.ranges) == 2 for one in plan.values for c in one.conversions)
    assert {one.dtype for one in plan.values} == {"uint16"}


def test_ranges_follow_the_bins(plan: QuantPlan) -> None:
    """The activations of this model change over the timesteps: most values' ranges differ between the bins."""
    differing = sum(one.ranges[0].scale != one.ranges[1].scale for one in plan.values)
    assert differing > 0.7 * len(plan.values)


def test_bounded_functions_have_the_range_of_the_function(plan: QuantPlan, canonical: Graph) -> None:
    """HTP compilers put this very encoding there, whatever the graph says."""
    outputs = [node.outputs[0].name for node in canonical.nodes if node.op == "Sigmoid"]
    assert len(outputs) == 2
    for name in outputs:
        assert {(r.scale, r.zero_point) for r in of(plan, name).ranges} == {(1 / 65536, 0)}


def test_what_only_moves_data_keeps_the_range(canonical: Graph, record: Any, tiny: Model) -> None:
    """Also where a linear behind it was given a narrower one: that becomes a conversion."""
    method = replace(sixteen(), activations=replace(sixteen().activations, bits=8, range="mse"))
    plan, _ = planned(canonical, record, tiny, method)
    moved = [node for node in canonical.nodes if node.op in ("Reshape", "Transpose")]
    assert len(moved) > 20
    for node in moved:
        source, result = (next(p for p in plan.values if p.name == v.name) for v in (node.inputs[0], node.outputs[0]))
        if source.dtype == result.dtype:
            assert source.ranges == result.ranges


def test_only_the_second_operand_of_a_product_is_symmetric(plan: QuantPlan, canonical: Graph) -> None:
    products = canonical.attention_matmuls()
    assert len(products) == 8
    for node in products:
        first, second = (of(plan, operand.name) for operand in node.inputs)
        assert all(node.name not in one.readers for one in first.conversions)
        [conversion] = [one for one in second.conversions if node.name in one.readers]
        assert conversion.dtype == "int16"
        for own, theirs in zip(second.ranges, conversion.ranges, strict=True):
            assert theirs.zero_point == 0
            assert theirs.scale * 32767 == pytest.approx(max(-own.lo, own.hi), rel=1e-6)


def test_a_range_that_was_searched_narrower_is_the_value_s_own_or_a_conversion(
    canonical: Graph, record: Any, tiny: Model
) -> None:
    method = replace(sixteen(), activations=replace(sixteen().activations, bits=8, range="mse"))
    plan, _ = planned(canonical, record, tiny, method)
    for layer in plan.layers:
        value = of(plan, layer.value)
        reader = f"{layer.name}/MatMul"
        given = next((c.ranges for c in value.conversions if reader in c.readers), value.ranges)
        for theirs, mine in zip(given, layer.activation, strict=True):
            assert abs(theirs.lo - mine.lo) <= 1e-3 * (mine.hi - mine.lo)
            assert abs(theirs.hi - mine.hi) <= 1e-3 * (mine.hi - mine.lo)


def test_bits_are_those_of_the_operator(canonical: Graph, record: Any, tiny: Model) -> None:
    """8 bits everywhere but in one block's FFN and in what the recipe keeps in float: values are converted between."""
    rules = (Override(match="blocks.1.ffn*", activations=16, why="test"),)
    method = replace(sixteen(override=rules), activations=replace(sixteen().activations, bits=8))
    plan, _ = planned(canonical, record, tiny, method)
    made = {value.name: value.inputs[0].name for value in float_values(canonical) if value.inputs}
    wide = ("blocks.1.ffn", "condition_embedder", "patch_embedding", "proj_out")
    for one in plan.values:
        path = made.get(one.name, "blocks").rpartition("/")[0]
        if one.name in made:
            assert one.dtype == ("uint16" if path.startswith(wide) else "uint8"), one.name
    [up] = [layer for layer in plan.layers if layer.name == "blocks.1.ffn.net.0.proj"]
    [conversion] = of(plan, up.value).conversions
    assert (of(plan, up.value).dtype, conversion.dtype) == ("uint8", "uint16")
    assert conversion.readers == ("blocks.1.ffn.net.0.proj/MatMul",)


def test_layers_kept_in_float_elsewhere_get_the_most_bits(canonical: Graph, record: Any, tiny: Model) -> None:
    method = replace(recipes.load("static-minmax"), weights=replace(recipes.load("static-minmax").weights, bits=4))
    plan, _ = planned(canonical, record, tiny, method)
    kept = [layer for layer in plan.layers if layer.name == "proj_out"]
    assert [(x.weight.bits if x.weight else 0, x.activation_bits) for x in kept] == [(8, 16)]
    assert "which has no float" in kept[0].bits_why
    assert {x.weight.bits for x in plan.layers if x.name.startswith("blocks") and x.weight} == {4}
    loose = replace(method, keep_float=(Keep(match="nothing", why="test"),))
    assert all(x.weight and x.weight.bits == 4 for x in planned(canonical, record, tiny, loose)[0].layers)


def test_nan_is_named(tiny: Model, canonical: Graph) -> None:
    broken = canonical.copy()
    weight = broken.linears()[3].weight
    values = np.array(weight.values)
    values[0, 0] = np.inf
    weight.values = values
    with pytest.raises(CalibrationError, match=r"timestep \d+"):
        observe_values(broken, tiny)


def test_no_trajectories_is_an_error(tiny: Model, traced: Graph) -> None:
    class Silent:
        name = "silent"

        def iter_trajectories(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(CalibrationError, match="brought no trajectories"):
        observe_values(traced, Silent())  # type: ignore[arg-type]


def constants_of(nodes: list[onnx.NodeProto], constants: dict[str, Any], shape: list[int]) -> dict[str, ConstantPlan]:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in constants.items()],
    )
    proto = onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]))
    return {one.name: one for one in plan_constants(Graph.from_proto(proto), lambda node: "uint16")}


def test_constants_by_what_they_are_for() -> None:
    rng = np.random.default_rng(0)
    found = constants_of(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], name="c"),
            helper.make_node("LayerNormalization", ["c", "gain", "shift"], ["n"], name="n"),
            helper.make_node("Mul", ["n", "table"], ["m"], name="m"),
            helper.make_node("Pow", ["m", "two"], ["p"], name="p"),
            helper.make_node("MatMul", ["p", "turn"], ["r"], name="t"),
            helper.make_node("MatMul", ["r", "mix"], ["y"], name="mixed"),
        ],
        {
            "w": rng.normal(size=(4, 3, 1, 1)), "b": rng.normal(size=4), "gain": rng.uniform(0.5, 2, 8),
            "shift": rng.normal(size=8), "table": np.linspace(-1, 3, 8).reshape(1, 1, 8), "two": 2.0,
            "turn": np.kron(np.eye(4), np.array([[1, 1], [1, -1]])).reshape(1, 8, 8) / np.sqrt(2),
            "mix": rng.normal(size=(1, 8, 2)),
        },
        [1, 3, 5, 8],
    )  # fmt: skip
    assert {n: (c.dtype, c.axis, len(c.scale), c.readers) for n, c in found.items()} == {
        "w": ("int8", 0, 4, ("c",)),
        "b": ("int32", None, 0, ("c",)),
        "gain": ("uint8", None, 1, ("n",)),
        "shift": ("int32", None, 1, ("n",)),
        "table": ("uint16", None, 1, ("m",)),
        "turn": ("int8", None, 1, ("t",)),
        "mix": ("int16", None, 1, ("mixed",)),
    }
    assert found["table"].scale[0] == pytest.approx(4 / 65535, rel=0.01)
    assert found["table"].zero_point == pytest.approx(65535 / 4, rel=0.01)
    hadamard = found["turn"].scale[0] * 127 * np.sqrt(2)
    assert hadamard == pytest.approx(1.0, rel=1e-6), "every entry is a level"


def test_a_constant_that_is_not_finite_is_named() -> None:
    nodes = [helper.make_node("Add", ["x", "mask"], ["y"], name="masked")]
    with pytest.raises(CalibrationError, match="constant mask, read by masked, holds NaN or Inf"):
        constants_of(nodes, {"mask": [0.0, -np.inf]}, [1, 2])
