"""bisect names the operator that was planted, and none in a healthy graph; in the real compiler and emulator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import pytest

from tests.quantized_blocks import FAULTS, Builder, block, linear
from vdq_export import ort
from vdq_export.devices.first_difference import bisect
from vdq_export.errors import CompileError, ModelError
from vdq_export.graph import Array, Graph
from vdq_export.graphs.cut import operators, part, unquantized
from vdq_export.metrics import sqnr_db
from vdq_export.targets.qnn import hexagon
from vdq_export.targets.qnn.emulate import EmulatorError

on_hexagon = pytest.mark.skipif(not hexagon.available(), reason="needs onnxruntime-qnn")


def in_process(graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
    """The emulator without a process for each run: what is planted here crashes nothing."""
    session = hexagon.emulator(graph.to_proto().SerializeToString(), "v75")
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True)) if feeds is not None else {}


@on_hexagon
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    graph, feeds = block(fault)
    found = bisect(graph, feeds, run=in_process, out=tmp_path)
    suspect = found.suspect
    assert suspect is not None
    assert suspect.node == FAULTS[fault]
    assert suspect.together_with == (("embed/Add",) if fault == "broadcast" else ())
    if fault == "refused":
        assert (suspect.what, found.device_db) == ("refused", None)
        assert "norm/LayerNormalization" in suspect.message
    else:
        assert suspect.what == "numbers"
        assert suspect.sqnr_db is not None and suspect.sqnr_db < 50
        assert suspect.error_steps is not None and suspect.error_steps > 20
    assert suspect.arbiter_db is not None and suspect.arbiter_db > 80, "onnxruntime is right, not the device"
    _check_reproduction(tmp_path / suspect.reproduction, suspect.node, fault)


def _check_reproduction(path: Path, node: str, fault: str) -> None:
    """What is saved holds the fault alone, with the feeds and results that show it."""
    alone = Graph.load(path)
    assert node in {one.name for one in operators(alone)}
    assert len(operators(alone)) == (2 if fault == "broadcast" else 1)
    with np.load(path.with_suffix(".npz")) as stored:
        feeds = {key.removeprefix("in:"): stored[key] for key in stored.files if key.startswith("in:")}
        expected = {key.removeprefix("out:"): stored[key] for key in stored.files if key.startswith("out:")}
    if fault == "refused":
        with pytest.raises(CompileError):
            in_process(alone, feeds)
        return
    found = in_process(alone, feeds)
    assert expected.keys() == found.keys()
    assert min(sqnr_db(expected[name], found[name]) for name in found) < 50


@on_hexagon
def test_nothing_is_named_in_a_healthy_graph() -> None:
    graph, feeds = block()
    found = bisect(graph, feeds, run=in_process)
    assert (found.suspect, found.runs, found.operators) == (None, 1, 28)
    assert found.device_db is not None and found.device_db > min(found.exact_db - 4, 70)


def exact(graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
    return {} if feeds is None else ort.run(graph, feeds, exact=True)


def chain(length: int = 9, dtype: str = "uint16") -> tuple[Graph, dict[str, Array]]:
    """x → linear0 → linear1 …, 8 channels wide."""
    make = Builder(dtype=dtype)
    x = make.input("x", 1, 4, 8)
    for index in range(length):
        x = linear(make, x, f"layer{index}", 8)
    return make.graph(x), make.feeds


class Faulty:
    """A device that is exact but for one operator, and remembers what it was given."""

    def __init__(self, node: str, *, noise: float = 0.0, error: Exception | None = None, needs: str = "") -> None:
        self.node, self.noise, self.error, self.needs = node, noise, error, needs
        self.seen: list[int] = []

    def __call__(self, graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
        self.seen.append(len(operators(graph)))
        names = {one.name for one in operators(graph)}
        hit = self.node in names and (not self.needs or self.needs in names)
        if hit and self.error is not None:
            raise self.error
        if hit and self.noise:
            graph = graph.copy()
            constant = next(n for n in graph.nodes if n.name == self.node).inputs[1].inputs[0].inputs[1]
            constant.values = (constant.values * (1 + self.noise)).astype(np.float32)
        return exact(graph, feeds)


@pytest.mark.parametrize("index", [0, 4, 8])
@pytest.mark.parametrize("kind", ["MatMul", "Add"])
def test_first_middle_and_last_operator(index: int, kind: str) -> None:
    graph, feeds = chain()
    device = Faulty(f"layer{index}/{kind}", noise=2.0)
    found = bisect(graph, feeds, run=device)
    assert found.suspect is not None and found.suspect.node == device.node
    assert found.runs == len(device.seen) <= 7, "halving: 18 operators take a handful of runs"
    assert device.seen[-1] == 1, "the operator alone"


def test_the_first_of_two_faults_is_named() -> None:
    graph, feeds = chain()
    early, late = Faulty("layer2/MatMul", noise=2.0), Faulty("layer7/MatMul", noise=2.0)

    def both(graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
        names = {one.name for one in operators(graph)}
        return early(graph, feeds) if early.node in names else late(graph, feeds)

    found = bisect(graph, feeds, run=both)
    assert found.suspect is not None and found.suspect.node == "layer2/MatMul"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (CompileError("Failed to finalize"), "refused"),
        (EmulatorError("Segmentation fault"), "no result"),
    ],
)
def test_a_compile_that_fails_names_its_operator(error: Exception, what: str) -> None:
    graph, feeds = chain()
    found = bisect(graph, feeds, run=Faulty("layer5/Add", error=error))
    assert found.device_db is None and found.suspect is not None
    assert (found.suspect.node, found.suspect.what, found.suspect.message) == ("layer5/Add", what, str(error))


def test_operators_that_fail_only_together() -> None:
    graph, feeds = chain()
    found = bisect(graph, feeds, run=Faulty("layer5/Add", error=CompileError("no"), needs="layer3/Add"))
    suspect = found.suspect
    assert suspect is not None and suspect.node == "layer5/Add"
    assert suspect.together_with == ("layer3/Add", "layer4/MatMul", "layer4/Add", "layer5/MatMul")


@pytest.mark.parametrize(("share", "named"), [(0.02, False), (0.8, True)])
def test_roundings_that_fall_the_other_way_are_no_operators_fault(share: float, named: bool) -> None:
    """Every operator one step off in a share of its values: at most the whole is said to have added up."""
    graph, feeds = chain(dtype="uint8")
    random = np.random.default_rng(0)

    def other_way(graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
        made = exact(graph, feeds)
        for one in graph.gs.outputs:
            step, shape = one.inputs[0].inputs[1].values, made[one.name].shape
            made[one.name] = made[one.name] + step * (random.random(shape) < share)
        return made

    suspect = bisect(graph, feeds, run=other_way).suspect
    assert (suspect is not None) == named
    assert suspect is None or suspect.what == "accumulated"


def test_nan_is_a_fault() -> None:
    graph, feeds = chain()

    def broken(graph: Graph, feeds: Mapping[str, Array] | None) -> dict[str, Array]:
        made = exact(graph, feeds)
        return {name: array * np.nan for name, array in made.items()}

    found = bisect(graph, feeds, run=broken)
    assert found.suspect is not None and (found.suspect.node, found.suspect.sqnr_db) == ("layer0/MatMul", -200.0)


def test_a_part_is_the_graph_restricted() -> None:
    graph, feeds = block()
    values = dict(feeds)
    nodes = operators(graph)
    settled = [name for name in graph.values() if name.endswith("/DQ")]
    values |= ort.run(graph, feeds, [*(n.outputs[0].name for n in nodes), *settled], exact=True)
    cut = part(graph, [n.name for n in nodes[5:12]], values)
    assert {n.name for n in operators(cut.graph)} == {n.name for n in nodes[5:12]}
    found = ort.run(cut.graph, {name: values[name] for name in cut.inputs}, exact=True)
    for name in cut.outputs:
        np.testing.assert_array_equal(found[name], values[name])


def test_unquantized_rounds_no_value_and_keeps_the_weights() -> None:
    graph, feeds = chain(2)
    stripped = unquantized(graph)
    assert {n.op for n in stripped.nodes} == {"DequantizeLinear", "MatMul", "Add"}
    x: Any = feeds["x"]
    values = {n.outputs[0].name: onnx.reference.ReferenceEvaluator(graph.to_proto()).run([n.outputs[0].name], feeds)[0]
              for n in graph.nodes if n.op == "DequantizeLinear" and not n.name.endswith("/DQ")}  # fmt: skip
    for index in range(2):
        x = x @ values[f"layer{index}.weight"] + values[f"layer{index}.bias"]
    (found,) = ort.run(stripped, feeds, exact=True).values()
    np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-5)


def test_a_missing_feed_is_said() -> None:
    graph, _ = chain(1)
    with pytest.raises(ModelError, match="no feed for the graph's input 'x'"):
        bisect(graph, {})


def test_a_graph_without_operators_is_said() -> None:
    graph, _ = chain(1)
    graph.gs.outputs = list(graph.gs.inputs)
    graph.cleanup()
    with pytest.raises(ModelError, match="no operators"):
        bisect(graph, {"x": np.zeros(1, np.float32)})
