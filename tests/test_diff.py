"""Differences of graphs and bundles: the edit that was made, all of it and nothing else, whatever the names."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper

from tests import tiny_bundle
from tests.graphs import Builder, get_param, insert, node, quantized_linear, renamed, set_param, transformer
from vdq_export.commands.diff import diff_command
from vdq_export.diff.bins import pair_graphs, partners
from vdq_export.diff.compare import Change, Difference, diff, diff_views
from vdq_export.diff.text import render
from vdq_export.errors import VdqError
from vdq_export.graphs import view as graph_view
from vdq_export.schedule import ScheduledBin, When


def scrambled(name: str) -> str:
    return "n" + hashlib.sha256(name.encode()).hexdigest()[:10]


def compare(a: onnx.ModelProto, b: onnx.ModelProto) -> Difference:
    return diff_views(graph_view.from_proto(a, "a"), graph_view.from_proto(b, "b"))


@pytest.fixture(params=[False, True], ids=["own weights", "equal weights"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A transformer of 6 blocks of one structure."""
    return transformer(equal_weights=request.param)


Disguise = Callable[[onnx.ModelProto], onnx.ModelProto]


@pytest.fixture(params=[False, True], ids=["names kept", "names scrambled, nodes shuffled"])
def disguise(request: pytest.FixtureRequest) -> Disguise:
    """What happens to an edited graph before it is compared."""

    def scramble(model: onnx.ModelProto) -> onnx.ModelProto:
        other = renamed(model, scrambled)
        nodes = list(other.graph.node)
        random.Random(3).shuffle(nodes)
        del other.graph.node[:]
        other.graph.node.extend(nodes)
        return other

    return scramble if request.param else copy_of


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def only(difference: Difference) -> Change:
    """The one change there must be."""
    assert not difference.same
    assert len(difference.changes) == 1, render(difference)
    return difference.changes[0]


def test_same(model: onnx.ModelProto, disguise: Disguise) -> None:
    difference = compare(model, disguise(model))
    assert difference.same and difference.changes == () and difference.counts == {}


def test_renaming_everything_is_counted_but_no_difference(model: onnx.ModelProto) -> None:
    difference = compare(model, renamed(model, scrambled, ends=True))
    assert difference.same
    assert difference.renamed == len(model.graph.node) + 2
    assert difference.renamed_io == (f"x -> {scrambled('x')}", f"blocks.5/Add_1 -> {scrambled('blocks.5/Add_1')}")
    assert "renamed" in render(difference)


def test_added_and_removed(model: onnx.ModelProto, disguise: Disguise) -> None:
    edited = copy_of(model)
    insert(edited, "blocks.3.ffn.up/Add", "Neg", "extra")
    edited = disguise(edited)
    added, removed = only(compare(model, edited)), only(compare(edited, model))
    assert (added.kind, removed.kind) == ("added", "removed")
    assert added.detail == removed.detail and added.detail.startswith("Neg(")


def test_edits_in_every_block(model: onnx.ModelProto, disguise: Disguise) -> None:
    """No operator keeps all of its surroundings, above or below."""
    edited = copy_of(model)
    for index in range(6):
        insert(edited, f"blocks.{index}.attn.to_q/Add", "Neg", f"extra.{index}")
        insert(edited, f"blocks.{index}/Add", "Tanh", f"more.{index}")
    difference = compare(model, disguise(edited))
    assert difference.counts == {"added": 12}, render(difference)


def test_a_block_removed(disguise: Disguise) -> None:
    difference = compare(transformer(6, equal_weights=True), disguise(transformer(5, equal_weights=True)))
    assert difference.counts == {"removed": 19}, render(difference)


def test_retyped(model: onnx.ModelProto, disguise: Disguise) -> None:
    edited = copy_of(model)
    node(edited, "blocks.2.ffn/Gelu").op_type = "Relu"
    assert only(compare(model, disguise(edited))) == Change("retyped", "blocks.2.ffn/Gelu", "Gelu -> Relu")


def test_attribute(model: onnx.ModelProto, disguise: Disguise) -> None:
    edited = copy_of(model)
    node(edited, "blocks.4.attn/Softmax").attribute[0].i = 1
    assert only(compare(model, disguise(edited))) == Change("retyped", "blocks.4.attn/Softmax", "axis: -1 -> 1")


def test_shape_of_an_input_is_one_change(model: onnx.ModelProto) -> None:
    edited = copy_of(model)
    del edited.graph.value_info[:]
    for value in [*edited.graph.input, *edited.graph.output]:
        value.type.tensor_type.shape.dim[1].dim_value = 5
    difference = compare(model, onnx.shape_inference.infer_shapes(edited))
    assert only(difference) == Change("retyped", "x", "f32[1,4,8] -> f32[1,5,8]")
    assert difference.follow_on == len(model.graph.node)


def test_rewired(model: onnx.ModelProto, disguise: Disguise) -> None:
    edited = copy_of(model)
    node(edited, "blocks.4/Add_1").input[0] = "blocks.3/Add"
    change = only(compare(model, disguise(edited)))
    assert (change.kind, change.where) == ("rewired", "blocks.4/Add_1")
    assert change.detail.startswith("input 0: blocks.4/Add -> ")


def test_outputs_in_another_order() -> None:
    make = Builder()
    a, b = make.op("Relu", "x", name="a"), make.op("Tanh", "x", name="b")
    assert only(compare(make.model([a, b]), make.model([b, a]))).kind == "rewired"


def test_operands_swapped_in_a_subtraction() -> None:
    make, other = Builder(), Builder()
    for one, operands in ((make, ("a", "b")), (other, ("b", "a"))):
        one.op("Sub", one.op("Relu", "x", name=operands[0]), one.op("Tanh", "x", name=operands[1]), name="y")
    difference = compare(make.model(["y"]), other.model(["y"]))  # the names were swapped with them: still the same
    assert difference.same and difference.renamed == 2
    other.nodes[-1].input[:] = ["a", "b"]
    assert compare(make.model(["y"]), other.model(["y"])).counts == {"rewired": 2}


def test_one_byte_of_one_weight(model: onnx.ModelProto, disguise: Disguise) -> None:
    edited = copy_of(model)
    value = get_param(edited, "blocks.1.attn.to_k.weight")
    value.view(np.uint8)[0, 0] ^= 1
    set_param(edited, "blocks.1.attn.to_k.weight", value)
    change = only(compare(model, disguise(edited)))
    assert (change.kind, change.where) == ("parameter", "blocks.1.attn.to_k/MatMul")
    assert change.detail.startswith("blocks.1.attn.to_k.weight: f32[8,8] sha256") and "1 of 64 values" in change.detail


def test_every_weight_changed(disguise: Disguise) -> None:
    """Structure alone must pair all operators: blocks in a row have places, if no weights, in common."""
    edited = transformer(equal_weights=True)
    for tensor in list(edited.graph.initializer):
        set_param(edited, tensor.name, get_param(edited, tensor.name) * 2)
    difference = compare(transformer(), disguise(edited))
    assert difference.counts == {"parameter": 72}, render(difference)


def test_weight_of_another_shape_or_dtype() -> None:
    model = quantized_linear()
    edited = copy_of(model)
    set_param(edited, "proj.weight", get_param(edited, "proj.weight").astype(np.int16))
    change = only(compare(model, edited))
    assert change == Change("retyped", "proj.weight/DQ", "integers: int8[8,8] -> int16[8,8]")


def test_scale_and_zero_point(disguise: Disguise) -> None:
    """Q and DQ share them: each is one change, told with its layer, old and new value."""
    difference = compare(quantized_linear(0.05, 128), disguise(quantized_linear(0.06, 120)))
    assert difference.changes == (
        Change("parameter", "proj/Q", "scale: 0.05 -> 0.06 (+20.000%)", ("proj/DQ",)),
        Change("parameter", "proj/Q", "zero_point: 128 -> 120 (-8)", ("proj/DQ",)),
    )


def test_constant_node_or_initializer_is_the_same() -> None:
    model = quantized_linear()
    edited = copy_of(model)
    tensor = edited.graph.initializer.pop(0)
    edited.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    assert compare(model, edited).same


def test_random_edits_are_found_and_symmetric(model: onnx.ModelProto, disguise: Disguise) -> None:
    """Up to 4 insertions and changed types at random: exactly these, and the mirror image the other way round."""
    dice = random.Random(11)
    values = [n.output[0] for n in model.graph.node][:-1]
    for _ in range(12):
        edited = copy_of(model)
        inserted = dice.sample(values, dice.randint(1, 4))
        for index, value in enumerate(inserted):
            insert(edited, value, "Neg", f"extra.{index}")
        node(edited, "blocks.0.ffn/Gelu").op_type = "Relu"
        edited = disguise(edited)
        there, back = compare(model, edited), compare(edited, model)
        assert there.counts == {"added": len(inserted), "retyped": 1}, f"{inserted}\n{render(there)}"
        assert back.counts == {"removed": len(inserted), "retyped": 1}
        added = {c.where for c in there.changes if c.kind == "added"}
        assert added == {c.where for c in back.changes if c.kind == "removed"}


def test_2000_operators() -> None:
    """A pass over each edge for each of a fixed number of signatures; a search over pairs would not end here."""
    model = transformer(110)
    edited = renamed(model, scrambled)
    edited.graph.node[900].op_type = "Sub"
    assert len(model.graph.node) > 2000
    assert only(compare(model, edited)).kind == "retyped"


def saved(model: onnx.ModelProto, path: Path, external: bool = False) -> Path:
    options = {"save_as_external_data": True, "location": path.name + ".data", "size_threshold": 0} if external else {}
    onnx.save_model(copy_of(model), str(path), **options)  # type: ignore[arg-type]
    return path


def test_external_data_compares_with_inline(tmp_path: Path, model: onnx.ModelProto) -> None:
    inline, external = saved(model, tmp_path / "a.onnx"), saved(model, tmp_path / "b.onnx", external=True)
    assert diff(inline, external).same
    data = tmp_path / "b.onnx.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert only(diff(inline, external)).kind == "parameter"


def test_external_data_truncated_missing_or_outside(tmp_path: Path, model: onnx.ModelProto) -> None:
    path = saved(model, tmp_path / "b.onnx", external=True)
    data = tmp_path / "b.onnx.data"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(VdqError, match="truncated"):
        diff(path, path)
    data.rename(tmp_path.parent / "outside.data")
    with pytest.raises(VdqError, match="missing"):
        diff(path, path)
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        next(e for e in tensor.external_data if e.key == "location").value = "../outside.data"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(VdqError, match="leaves the folder"):
        diff(path, path)


def test_command(tmp_path: Path) -> None:
    a = saved(quantized_linear(0.05), tmp_path / "a.onnx")
    b = saved(quantized_linear(0.06), tmp_path / "b.onnx")
    same, text, as_json = (
        CliRunner().invoke(diff_command, [str(a), *rest]) for rest in ([str(a)], [str(b)], [str(b), "--json"])
    )
    assert same.exit_code == 0 and same.output.startswith("same")
    assert text.exit_code == 1 and "proj/Q: scale: 0.05 -> 0.06" in text.output
    assert as_json.exit_code == 1
    answer = json.loads(as_json.output)
    assert answer["same"] is False and answer["counts"] == {"parameter": 1}
    assert answer["changes"][0].keys() == {"kind", "where", "detail", "also"}


@pytest.mark.parametrize("content", [None, b"", b"not a graph at all", b"\x08\x01"])
def test_cannot_compare(tmp_path: Path, content: bytes | None) -> None:
    good, bad = saved(quantized_linear(), tmp_path / "a.onnx"), tmp_path / "bad.onnx"
    if content is not None:
        bad.write_bytes(content)
    for pair in ((good, bad), (bad, good), (good, tmp_path)):
        result = CliRunner().invoke(diff_command, [str(one) for one in pair])
        assert isinstance(result.exception, VdqError) and result.exception.exit_code == 2
        assert result.output == ""


def test_graph_with_a_cycle_or_a_hole() -> None:
    model = quantized_linear()
    node(model, "proj/MatMul").input[0] = "proj/Add"
    with pytest.raises(VdqError, match="cycle"):
        graph_view.from_proto(model)
    node(model, "proj/MatMul").input[0] = "nowhere"
    with pytest.raises(VdqError, match="proj/MatMul reads 'nowhere'"):
        graph_view.from_proto(model)


def test_bins_are_compared_with_those_of_the_same_steps(tmp_path: Path) -> None:
    """Bin 1 of four is not bin 1 of three."""
    four = tiny_bundle.write(tmp_path / "four")
    three = tiny_bundle.write(tmp_path / "three", edges=(1000.0, 500.0, 250.0, 0.0))
    assert [label for label, _, new in pair_graphs(four, three) if new is None] == ["bin01"]
    found = diff(four.path, three.path)
    assert [(x.kind, x.where, x.detail) for x in found.changes if x.kind == "removed"] == [
        ("removed", "bin01", "graph body.bin01.onnx: no counterpart")
    ]
    places = {x.where.partition(": ")[0] for x in found.changes if x.kind == "parameter"}
    assert places == {"bin02 -> bin01", "bin03 -> bin02"}, "gains go by number in both"
    assert diff(three.path, three.path).same


def test_bins_of_other_experts_branches_and_steps_are_no_counterparts() -> None:
    def one(hi: float, lo: float, **calls: Any) -> ScheduledBin:
        return ScheduledBin(graph="x", when=When(t=(lo, hi), **calls))

    high, low = one(1000, 500, expert="high"), one(500, 0, expert="low")
    halves = one(500, 250, expert="low"), one(250, 0, expert="low")
    assert partners((high, low), (high, low)) == {0: 0, 1: 1}
    assert partners((low, high), (high, *halves)) == {0: 1, 1: 0}
    assert partners((one(500, 0),), (one(500, 0, branch="cond"),)) == {}
    assert partners((one(500, 0),), (one(1000, 500), one(600, 100))) == {0: 1}
