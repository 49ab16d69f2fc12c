"""Hoisting: the parts together are the graph to the last bit, on random graphs and on families; the cut is the best."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from tests import graphs, tiny_model
from tests.families import FAMILIES
from vdq_export import ort, pipeline
from vdq_export.calib.constant_inputs import Constancy
from vdq_export.contract import PassContext
from vdq_export.errors import PassError
from vdq_export.graph import Array, Graph, Node
from vdq_export.hoisting import cut as hoisting_cut
from vdq_export.hoisting import split as hoisting
from vdq_export.hoisting.split import Feeds, Hoisted, Role, split
from vdq_export.model import Model
from vdq_export.samples import digits
from vdq_export.trace import trace
from vdq_export.tracing.weightless import trace_weightless

ROLES: Mapping[str, Role] = {"x": "latents", "t": "timestep", "p": "prompt", "q": "prompt"}
TIMES = (900.0, 350.0, 20.0)
WRONG = 1e-3  # of the largest output: parts that are wrong differ by more, parts that are right by nothing at all


# -- random graphs ---------------------------------------------------------------------------------------------------


def loaded(model: onnx.ModelProto) -> Graph:
    model.ir_version = 10  # onnx writes a newer one than onnxruntime reads
    return Graph.from_proto(model)


@st.composite
def random_graphs(draw: st.DrawFn, size: int = 14) -> Graph:
    """Values [1, 4, 8]; linears, elementwise and copying operators, two outputs from a Split, constants' own nodes."""
    make = graphs.Builder(draw(st.integers(0, 99)))
    values = [*ROLES, make.weight("c", 1, 4, 8)]
    for index in range(draw(st.integers(3, size))):
        kind = draw(st.sampled_from(["linear", "Add", "Mul", "Softmax", "Split", "Sum"]))
        one, two = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        name = f"n{index}/{kind}"
        if kind == "linear":
            made = make.linear(one, f"n{index}")
        elif kind == "Split":
            halves = [f"{name}:0", f"{name}:1"]
            make.nodes.append(helper.make_node("Split", [one], halves, name=name, axis=2, num_outputs=2))
            values.append(make.op("Concat", halves[1], halves[0], name=f"n{index}/Concat", axis=2))
            made = make.op("Concat", halves[0], halves[0], name=f"n{index}/Concat_1", axis=2)
        elif kind == "Softmax":
            made = make.op("Softmax", one, name=name, axis=-1)
        else:
            made = make.op(kind, one, two, name=name)
        values.append(made)
    last = make.op("Add", draw(st.sampled_from(values)), values[-1], name="out")
    outputs = [last, *draw(st.lists(st.sampled_from(values[len(ROLES) + 1 :]), max_size=1))]
    return loaded(make.model(outputs, tuple(ROLES)))


def feeds_of(graph: Graph, seed: int = 0) -> list[Feeds]:
    """Three steps of one branch: latents and timestep change, the prompt does not."""
    random = np.random.default_rng(seed)

    def noise() -> Array:
        return random.standard_normal((1, 4, 8)).astype(np.float32)

    prompt = {"p": noise(), "q": noise()}
    steps = [{"x": noise(), "t": np.full((1, 4, 8), t / 1000, np.float32), **prompt} for t in TIMES]
    names = {value.name for value in graph.gs.inputs}
    return [{name: array for name, array in step.items() if name in names} for step in steps]


@settings(max_examples=60)
@given(random_graphs(), st.sampled_from([0, 300, 8000]), st.sampled_from([0, 1, 32]))
def test_parts_are_the_graph(graph: Graph, value: int, crossing: int) -> None:
    """Whatever crossing costs: from 0, where all that can move moves, to where little is worth it."""
    before = graph.hash()
    with mock.patch.multiple(hoisting_cut, VALUE=value, CROSSING=crossing):
        hoisted = split(graph, ROLES)
    assert graph.hash() == before
    assert hoisting.error(graph, hoisted, feeds_of(graph)) == 0.0
    for name, part in hoisted.parts().items():
        onnx.checker.check_model(part.to_proto(), full_check=True)
        read = {v.name for v in part.gs.inputs}
        if name in ("prompt", "step"):
            assert read <= ({"p", "q"} if name == "prompt" else {"t"})
        assert all(v.outputs or v.name in {o.name for o in part.gs.outputs} for v in part.gs.inputs)
    assert [o.name for o in hoisted.body.gs.outputs] == [o.name for o in graph.gs.outputs]


def cost(graph: Graph, ahead: set[str], movable: Sequence[Node], inputs: Sequence[str]) -> float:
    """What hoisting_cut minimises, added up from its description; infinite for what no cut may do."""
    stay = [node for node in graph.nodes if node.name not in ahead]
    total = 0
    for node in movable:
        if node.name not in ahead:
            total += hoisting_cut.step_cost(node)
            continue
        late = any(maker.name not in ahead for v in node.inputs for maker in v.inputs)
        if late or any(v.name == o.name for v in node.outputs for o in graph.gs.outputs):
            return np.inf
    here = {v.name for node in movable if node.name in ahead for v in node.outputs} | set(inputs)
    across = {v.name: v for node in stay for v in node.inputs if v.name in here}
    return total + sum(hoisting_cut.VALUE + hoisting_cut.CROSSING * 32 for _ in across)


@settings(max_examples=60)
@given(random_graphs(size=9), st.sampled_from([0, 50, 300, 1500]))
def test_the_cut_is_the_cheapest(graph: Graph, value: int) -> None:
    """Against every other cut of what depends on the prompt only, and the larger one of equals."""
    graph.cleanup()
    late = {"x", "t"}
    for node in graph.nodes:
        late |= {v.name for v in node.outputs} if any(v.name in late for v in node.inputs) else set()
    early = {"p", "q"}
    for node in graph.nodes:
        if any(v.name in early for v in node.inputs) and node.outputs[0].name not in late:
            early |= {v.name for v in node.outputs}
    movable = [node for node in graph.nodes if node.outputs[0].name in early][:10]
    rest = [node for node in graph.nodes if all(node is not one for one in movable)]
    inputs = [v for v in graph.gs.inputs if v.name in ("p", "q")]
    with mock.patch.multiple(hoisting_cut, VALUE=value, CROSSING=1):
        finals = {o.name for o in graph.gs.outputs}
        found = hoisting_cut.cheapest(movable, inputs, rest, kept=finals)
        choices = [
            {node.name for node, chosen in zip(movable, bits, strict=True) if chosen}
            for bits in product((False, True), repeat=len(movable))
        ]
        costs = [cost(graph, choice, movable, ["p", "q"]) for choice in choices]
        assert cost(graph, found, movable, ["p", "q"]) == min(costs)
        assert all(choice <= found for choice, one in zip(choices, costs, strict=True) if one == min(costs))


def linears(graph: Graph) -> set[str]:
    return {linear.name for linear in graph.linears()}


@settings(max_examples=60)
@given(random_graphs(), st.sampled_from([0, 300, 8000]))
def test_the_chosen_linears_go_ahead_and_no_others(graph: Graph, value: int) -> None:
    """Whatever crossing costs when the graph is split, the layers are those chosen before."""
    graph.cleanup()
    chosen = hoisting.layers(graph, ROLES)
    with mock.patch.multiple(hoisting_cut, VALUE=value, CROSSING=1):
        hoisted = split(graph, ROLES, chosen)
    assert linears(hoisted.body) == linears(graph) - chosen.keys()
    assert set(chosen) == {name for one in hoisted.ahead().values() for name in linears(one)}
    assert hoisting.error(graph, hoisted, feeds_of(graph)) == 0.0


# -- what may move ---------------------------------------------------------------------------------------------------


def by_hand() -> tuple[graphs.Builder, str]:
    """x + linear(p) + linear(t) + linear(p + linear(t)): all three classes."""
    make = graphs.Builder()
    time = make.linear("t", "time")
    both = make.linear(make.op("Add", make.linear("p", "text"), time, name="both/Add"), "modulation")
    y = make.op("Sum", "x", make.linear("p", "key"), time, both, name="sum")
    return make, y


def everything_ahead(graph: Graph, roles: Mapping[str, Role] = ROLES) -> Hoisted:
    with mock.patch.multiple(hoisting_cut, VALUE=0, CROSSING=0):
        return split(graph, roles)


def test_three_classes_and_what_is_told_of_them() -> None:
    make, y = by_hand()
    hoisted = everything_ahead(loaded(make.model([y], ("x", "t", "p"))))
    assert [(c.name, c.part) for c in hoisted.crossings] == [
        ("text/Add", "prompt"), ("key/Add", "prompt"), ("time/Add", "step"), ("modulation/Add", "mixed"),
    ]  # fmt: skip
    assert {c.nbytes for c in hoisted.crossings} == {4 * 4 * 8}
    one = hoisting.Work(nodes=2, weight_bytes=4 * (64 + 8), multiply_adds=4 * 8 * 8)
    assert hoisting.work(hoisted.parts()["step"]) == one
    assert hoisting.work(hoisted.body) == hoisting.Work(nodes=1, weight_bytes=0, multiply_adds=0)
    assert (hoisted.whole.multiply_adds, hoisted.moved()) == (4 * one.multiply_adds, 1.0)
    assert [v.name for v in hoisted.body.gs.inputs] == ["x", "time/Add", "modulation/Add", "key/Add"]


def test_what_is_not_worth_it_stays() -> None:
    """A broadcast is wider than what it is made of, a small sum cheaper than an input: the body makes them itself."""
    make = graphs.Builder()
    narrow = make.op("ReduceMean", make.linear("p", "text"), make.param("axes", [1], "int64"), name="narrow")
    wide = make.op("Expand", narrow, make.param("sizes", [1, 4, 8], "int64"), name="wide")
    y = make.op("Sum", "x", "t", wide, make.op("Neg", "t", name="negative"), name="y")
    with mock.patch.object(hoisting_cut, "VALUE", 500):
        hoisted = split(loaded(make.model([y], ("x", "t", "p"))), ROLES)
    assert [(c.name, c.shape) for c in hoisted.crossings] == [("narrow", (1, 1, 8))]
    assert hoisted.step is None
    assert {v.name for v in hoisted.body.gs.inputs} == {"x", "t", "narrow"}


def test_outputs_and_random_numbers_stay_in_the_body() -> None:
    make = graphs.Builder()
    text = make.linear("p", "text")
    noise = make.op("RandomNormalLike", "p", name="noise")
    y = make.op("Sum", "x", text, noise, name="y")
    hoisted = everything_ahead(loaded(make.model([y, text], ("x", "p"))))
    assert [c.name for c in hoisted.crossings] == ["text/MatMul"]
    assert {"noise", "text/Add"} <= {n.name for n in hoisted.body.nodes}


def test_nothing_moves_where_everything_is_latents() -> None:
    make, y = by_hand()
    graph = loaded(make.model([y], ("x", "t", "p")))
    hoisted = everything_ahead(graph, {"x": "latents", "t": "latents", "p": "latents"})
    assert (list(hoisted.parts()), hoisted.crossings, hoisted.moved()) == (["body"], (), 0.0)
    assert hoisted.body.hash() == graph.hash()


def test_inputs_need_roles_and_control_flow_is_refused() -> None:
    make, y = by_hand()
    graph = loaded(make.model([y], ("x", "t", "p")))
    with pytest.raises(PassError, match="no role for the input 'p'"):
        split(graph, {"x": "latents", "t": "timestep"})
    graph.nodes[0].op = "If"
    with pytest.raises(PassError, match="around If"):
        split(graph, ROLES)


# -- models ----------------------------------------------------------------------------------------------------------


def canonical(graph: Graph) -> Graph:
    made = graph.copy()
    pipeline.run_passes(made, pipeline.CANONICAL, PassContext())
    return made


def of_a_branch(model: Model, roles: Mapping[str, Role], graph: Graph) -> list[Feeds]:
    """Steps of one branch whose prompt does not change, as random trajectories' prompts do."""
    steps = [step["inputs"] for step in next(iter(model.iter_trajectories())) if step["branch"] == "cond"]
    names = [value.name for value in graph.gs.inputs]
    return [{n: (steps[0] if roles[n] == "prompt" else step)[n].numpy() for n in names} for step in steps]


def family_roles(model: Model) -> dict[str, Role]:
    latent = next(iter(model.example_inputs))
    return {name: "latents" if name == latent else "prompt" for name in model.example_inputs} | {"timestep": "timestep"}


# Family -> the parts it has, and a layer that must have left the body.
MOVED = {
    "Wan": ("prompt step", "blocks.1.attn2.to_k"),
    "CogVideoX": ("prompt step", "transformer_blocks.1.norm2.linear"),
    "LTX-Video": ("prompt step", "caption_projection.linear_2"),
    "Latte": ("prompt step", "adaln_single.linear"),
    "HunyuanVideo": ("prompt step mixed", "single_transformer_blocks.0.norm.linear"),
}


@pytest.mark.parametrize("family", MOVED)
def test_families_recompose_to_the_last_bit(family: str) -> None:
    model = FAMILIES[family]()
    graph = canonical(trace(model))
    roles = family_roles(model)
    hoisted = split(graph, roles)
    assert hoisting.error(graph, hoisted, of_a_branch(model, roles, graph)) == 0.0
    parts, layer = MOVED[family]
    assert list(hoisted.parts()) == [*parts.split(), "body"]
    linears = {name: {one.name for one in part.linears()} for name, part in hoisted.parts().items()}
    assert layer not in linears["body"] and any(layer in found for found in linears.values())
    assert set().union(*linears.values()) == {one.name for one in graph.linears()}, "no layer is lost or renamed"
    assert sum(map(len, linears.values())) == len(graph.linears()), "and none stands twice"
    assert 0.2 <= hoisted.moved() <= 0.65
    assert sum(hoisting.work(part).multiply_adds for part in hoisted.parts().values()) == hoisted.whole.multiply_adds


def test_weights_are_not_needed(traced: Graph, tiny: Model) -> None:
    """A graph traced without weights is cut like the one with them; reading one would be an error."""
    network: Any = tiny.module
    weightless = trace_weightless(lambda: type(network).from_config(dict(network.config)), tiny.example_inputs)
    found, expected = (split(canonical(graph), family_roles(tiny)) for graph in (weightless, traced))
    assert found.crossings == expected.crossings
    assert found.whole == expected.whole
    assert [hoisting.work(one) for one in found.parts().values()] == [
        hoisting.work(one) for one in expected.parts().values()
    ]


@pytest.mark.parametrize("wrong", ["hidden_states", "timestep"])
def test_a_wrong_role_is_seen(traced: Graph, tiny: Model, wrong: str) -> None:
    graph, right = canonical(traced), family_roles(tiny)
    steps = of_a_branch(tiny, right, graph)
    assert hoisting.error(graph, split(graph, right), steps) == 0.0
    assert hoisting.error(graph, everything_ahead(graph, {**right, wrong: "prompt"}), steps) > WRONG


def test_a_wrong_weight_in_a_part_is_seen(traced: Graph, tiny: Model) -> None:
    graph, roles = canonical(traced), family_roles(tiny)
    hoisted = split(graph, roles)
    assert hoisted.prompt is not None
    weight = next(one.weight for one in hoisted.prompt.linears() if one.name == "blocks.1.attn2.to_v")
    weight.values = np.asarray(weight.values) * np.float32(1.1)
    assert hoisting.error(graph, hoisted, of_a_branch(tiny, roles, graph)) > WRONG
    weight.values = np.asarray(weight.values) * np.float32(np.nan)
    assert hoisting.error(graph, hoisted, of_a_branch(tiny, roles, graph)) == np.inf


def test_bytes_do_not_depend_on_the_order_of_hashes(traced: Graph, tmp_path: Path) -> None:
    traced.save(tmp_path / "traced.onnx")
    code = (
        "import sys; from pathlib import Path; from vdq_export.graph import Graph\n"
        "from vdq_export.hoisting.split import split\n"
        "roles = {'hidden_states': 'latents', 'timestep': 'timestep', 'encoder_hidden_states': 'prompt'}\n"
        "made = split(Graph.load(Path(sys.argv[1])), roles)\n"
        "print(*(one.hash() for one in made.parts().values()))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "traced.onnx")],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True,
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(told) == 1 and len(told.pop().split()) == 3


# -- tables ----------------------------------------------------------------------------------------------------------


def test_rows_of_tables_are_what_step_gives(traced: Graph) -> None:
    """In the order asked for, as a host reads them: beside the latents, the prompt's values and a row, no timestep."""
    hoisted = split(canonical(traced), family_roles(tiny_model.build()))
    assert hoisted.step is not None
    tables = hoisting.tables(hoisted.step, TIMES)
    assert {name: array.shape for name, array in tables.items()} == {
        c.name: (len(TIMES), *c.shape) for c in hoisted.crossings if c.part == "step"
    }
    assert "timestep" not in {v.name for v in hoisted.body.gs.inputs}
    for row, t in enumerate(TIMES):
        expected = ort.run(hoisted.step, {"timestep": np.array([t], np.float32)}, exact=True)
        assert all(np.array_equal(tables[name][row], array) for name, array in expected.items())
    assert not any(np.array_equal(array[0], array[1]) for array in tables.values())


def test_integer_timesteps() -> None:
    nodes = [
        helper.make_node("Cast", ["t"], ["float"], name="float", to=onnx.TensorProto.FLOAT),
        helper.make_node("Neg", ["float"], ["negative"], name="negative"),
    ]
    t = helper.make_tensor_value_info("t", onnx.TensorProto.INT64, [2])
    y = helper.make_tensor_value_info("negative", onnx.TensorProto.FLOAT, [2])
    opset = [helper.make_opsetid("", graphs.OPSET)]
    step = loaded(helper.make_model(helper.make_graph(nodes, "step", [t], [y]), opset_imports=opset))
    assert hoisting.tables(step, [3.0, 1.0])["negative"].tolist() == [[-3, -3], [-1, -1]]
    with pytest.raises(PassError, match=r"timestep 2\.5 is no int64"):
        hoisting.tables(step, [3.0, 2.5])


# -- roles -----------------------------------------------------------------------------------------------------------


def test_roles() -> None:
    inputs = ("hidden_states", "timestep", "encoder_hidden_states")
    assert hoisting.roles(inputs, "timestep", {"encoder_hidden_states"}) == {
        "hidden_states": "latents", "timestep": "timestep", "encoder_hidden_states": "prompt",
    }  # fmt: skip
    assert set(hoisting.roles(inputs, "timestep", ()).values()) == {"latents", "timestep"}


def test_the_sample_with_its_own_trajectories() -> None:
    """Roles, parts and equality on what the sampler really does, in both branches."""
    model = digits.load(calibration_cases=1)
    model.trajectories = [next(iter(model.iter_trajectories()))]
    seen = Constancy()
    for step in model.trajectories[0]:
        seen.see(step)
    roles = hoisting.roles(model.example_inputs, model.timestep_input, seen.names or ())
    assert sorted(roles.values()) == ["latents", "prompt", "timestep"]
    graph = canonical(trace(model))
    hoisted = split(graph, roles)
    assert {c.part for c in hoisted.crossings} >= {"step"} and hoisted.moved() > 0.1
    for branch in ("cond", "uncond"):
        steps = [s["inputs"] for s in model.trajectories[0] if s["branch"] == branch][::7]
        assert hoisting.error(graph, hoisted, [{n: a.numpy() for n, a in one.items()} for one in steps]) == 0.0
