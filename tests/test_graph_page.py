"""Pictures of graphs: boxes where they belong, every edit marked and nothing else, pages that a browser likes."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from tests import tiny_bundle
from tests.commands import command
from tests.graphs import get_param, insert, node, quantized_linear, set_param, transformer
from tests.host_cases import CHROMIUM, HOST, needs_chromium
from tests.host_cases import node as run_node
from vdq_export.commands.diff import diff_command
from vdq_export.commands.inspect import dumped, inspect_command
from vdq_export.diff.compare import compare
from vdq_export.drawing import graph as graph_draw
from vdq_export.drawing.graph import Picture
from vdq_export.drawing.layout import GAP, layered
from vdq_export.errors import UnknownNameError, VdqError
from vdq_export.graphs import part as graph_part
from vdq_export.graphs import view as graph_view
from vdq_export.report import graph_page


def edited() -> onnx.ModelProto:
    """transformer(3) with one operator added, one retyped and one weight changed, all in blocks.1."""
    model = transformer(3)
    insert(model, "blocks.1.attn.to_k/Add", "Neg", "blocks.1.attn/extra")
    node(model, "blocks.1.ffn/Gelu").op_type = "Relu"
    set_param(model, "blocks.1.attn.to_v.weight", 2 * get_param(model, "blocks.1.attn.to_v.weight"))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two graphs, and a folder as --dump-after writes it: qdq changed blocks.1, linear nothing."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "passes").mkdir()
    models = {"a": transformer(3), "b": edited(), "passes/no_ops": transformer(3), "passes/linear": transformer(3)}
    more = edited()
    insert(more, "blocks.1.attn/Softmax", "Abs", "blocks.1.attn/more")
    models |= {"passes/qdq": edited(), "passes/dynamic_quantize": more, "passes/qdq-2": more}
    for name, model in models.items():
        onnx.save_model(model, str(folder / f"{name}.onnx"))
    return folder


# -- layout ----------------------------------------------------------------------------------------------------------


def test_layers_go_down_and_boxes_never_touch() -> None:
    random = np.random.default_rng(5)
    edges = {(int(a), int(b)) for a, b in np.sort(random.integers(0, 60, (110, 2)), axis=1) if a < b}
    sizes = {key: (float(random.integers(20, 150)), 30.0) for key in range(60)}
    made = layered(sizes, edges)
    assert made.places.keys() == sizes.keys()
    for a, b in edges:
        assert made.places[a][1] + 30.0 < made.places[b][1]
        assert made.ways[a, b][0] == (made.places[a][0], made.places[a][1] + 30.0)
        assert made.ways[a, b][-1] == made.places[b]
    for a in sizes:
        assert made.places[a][0] - sizes[a][0] / 2 >= 0 and made.places[a][0] + sizes[a][0] / 2 <= made.width + 1e-6
        for b in sizes:
            if a < b and made.places[a][1] == made.places[b][1]:
                apart = abs(made.places[a][0] - made.places[b][0])
                assert apart >= (sizes[a][0] + sizes[b][0]) / 2 + GAP - 1e-6


def test_a_chain_is_a_straight_line_and_a_source_stands_by_its_reader() -> None:
    sizes = dict.fromkeys("abcdes", (40.0, 20.0))
    made = layered(sizes, [*zip("abcd", "bcde", strict=True), ("s", "e")])
    assert len({round(made.places[key][0], 3) for key in "abc"}) == 1
    assert made.places["s"][1] == made.places["d"][1]
    assert layered({}, []).places == {}
    with pytest.raises(ValueError, match="cycle"):
        layered(sizes, [("a", "b"), ("b", "a")])


# -- pictures --------------------------------------------------------------------------------------------------------


def of(picture: Picture, status: str) -> list[str]:
    return [" ".join(box.lines) for box in picture.boxes if box.status == status]


def drawn(a: onnx.ModelProto, b: onnx.ModelProto, block: str) -> tuple[Picture, Picture]:
    found = compare(graph_view.from_proto(a), graph_view.from_proto(b))
    members = [graph_draw.members(side, block) for side in (found.matching.a, found.matching.b)]
    return graph_draw.draw_pair(found, members[0], members[1], block)


def test_a_block_with_its_ends() -> None:
    view = graph_view.from_proto(transformer(3))
    assert graph_draw.blocks(view) == ("blocks.0", "blocks.1", "blocks.2")
    picture = graph_draw.draw(view, "blocks.1")
    assert picture.counts == {"same": 19, "changed": 0, "only": 0}
    assert sorted(of(picture, "end")) == ["blocks.0/Add_1 f32[1,4,8]", "blocks.1/Add_1 f32[1,4,8]"]
    assert "MatMul attn.to_q/MatMul [f32[8,8]]" in of(picture, "same")
    assert len(graph_draw.draw(view, "blocks.1.ffn").boxes) == 5 + 2
    assert graph_draw.draw(view, None).counts["same"] == 57
    with pytest.raises(UnknownNameError, match=r"unknown block 'block\.1'; did you mean blocks\.1"):
        graph_draw.draw(view, "block.1")


def test_hovers_tell_types_shapes_and_quantization() -> None:
    picture = graph_draw.draw(graph_view.from_proto(quantized_linear()), None)
    tips = {line.tip.partition(":")[0]: line.tip for line in picture.lines}
    assert tips["x"] == "x: f32[1,4,8], quantized to uint8, scale 0.05, zero_point 128"
    assert tips["proj/Q"] == "proj/Q: uint8[1,4,8], quantized to uint8, scale 0.05, zero_point 128"
    assert tips["proj.weight/DQ"].endswith("f32[8,8], quantized to int8, scale 0.01 … 0.02 (8 values)")
    assert tips["proj/MatMul"] == "proj/MatMul: f32[1,4,8]"
    boxes = {box.lines[1]: box.tip for box in picture.boxes}
    assert "reads proj.bias: f32[8] [" in boxes["proj/Add"]
    assert "axis = 1" in boxes["proj.weight/DQ"] and "reads integers: int8[8,8], quantized" in boxes["proj.weight/DQ"]


def test_every_edit_is_marked_and_nothing_else() -> None:
    before, after = drawn(transformer(3), edited(), "blocks.1")
    assert (before.counts, after.counts) == (
        {"same": 17, "changed": 2, "only": 0},
        {"same": 17, "changed": 2, "only": 1},
    )
    assert of(after, "only") == ["Neg attn/extra"]
    assert {text.split()[0] for text in of(before, "changed")} == {"Gelu", "MatMul"}
    (gelu,) = (box for box in after.boxes if box.lines[0] == "Relu")
    assert gelu.tip.startswith("retyped: Gelu -> Relu")
    there, back = drawn(edited(), transformer(3), "blocks.1")
    assert (there.counts, back.counts) == (after.counts, before.counts)
    same = drawn(transformer(3), edited(), "blocks.0")
    assert all(one.counts == {"same": 19, "changed": 0, "only": 0} for one in same)


def test_what_is_in_both_stands_at_one_place() -> None:
    before, after = drawn(transformer(3), edited(), "blocks.1")
    places = {box.key: (box.x + box.width / 2, box.y) for box in before.boxes}
    shared = [box for box in after.boxes if box.key in places]
    assert len(shared) == len(before.boxes) == len(after.boxes) - 1
    for box in shared:
        assert (box.x + box.width / 2, box.y) == pytest.approx(places[box.key], abs=0.2)


def test_order_that_turned_round_is_still_drawn() -> None:
    """No common layout exists: each side gets its own."""

    def chain(*kinds: str) -> onnx.ModelProto:
        model = transformer(1)
        last = model.graph.output[0].name
        for kind in kinds:
            model.graph.node.append(onnx.helper.make_node(kind, [last], [f"end/{kind}"], name=f"end/{kind}"))
            last = f"end/{kind}"
        model.graph.output[0].name = last
        return model

    a, b = (graph_view.from_proto(chain(*kinds)) for kinds in (("Sin", "Cos", "Tanh"), ("Tanh", "Sin", "Cos")))
    found = compare(a, b)
    everything = [graph_draw.members(side, None) for side in (found.matching.a, found.matching.b)]
    pictures = graph_draw.draw_pair(found, everything[0], everything[1])
    assert all(len(one.boxes) == 19 + 3 + 2 for one in pictures)


def test_operators_of_one_name_are_told_apart() -> None:
    a, b = transformer(3), transformer(3)
    for model in (a, b):
        for one in model.graph.node:
            one.name = "again"
    next(n for n in b.graph.node if n.op_type == "Gelu" and n.output[0].startswith("blocks.1.")).op_type = "Relu"
    found = compare(graph_view.from_proto(a), graph_view.from_proto(b))
    sides = graph_draw.draw_pair(
        found, graph_draw.members(found.matching.a, None), graph_draw.members(found.matching.b, None)
    )
    assert [one.counts["changed"] for one in sides] == [1, 1]
    assert [len(one) for one in graph_draw.touched(found)] == [1, 1]


def shared(scale: float) -> onnx.ModelProto:
    """transformer(3) whose blocks read one to_v weight."""
    model = transformer(3)
    for one in model.graph.node:
        one.input[:] = ["shared" if x.endswith(".attn.to_v.weight") else x for x in one.input]
    weight = scale * get_param(model, "blocks.0.attn.to_v.weight")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "shared"))
    return model


def test_a_constant_that_many_read_is_a_change_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(name, tmp_path / f"{name}.onnx") for name in ("linear", "qdq")]
    for scale, (_, path) in enumerate(found, 1):
        onnx.save_model(shared(scale), str(path))
    page = graph_page.passes_page(tmp_path, found, "blocks.1").decode()
    assert "No pass changed" not in page and 'class="box changed"' in page
    monkeypatch.setattr(graph_page, "WHOLE", 20)
    page = graph_page.diff_page(found[0][1], found[1][1]).decode()
    assert re.findall(r'data-name="([\w.]+)"', page) == ["blocks.0", "blocks.1", "blocks.2"]
    assert "blocks.0.attn.to_v/MatMul, blocks.1.attn.to_v/MatMul, blocks.2.attn.to_v/MatMul" in page


# -- the part as a file ----------------------------------------------------------------------------------------------


def test_a_part_is_a_model_that_runs_when_its_constants_are_small(files: Path) -> None:
    view = graph_view.load(files / "a.onnx")
    made = {op.outputs[0] for op in view.ops if graph_draw.is_in(op.name, "blocks.1")}
    part = graph_part.extract(files / "a.onnx", made)
    model = onnx.load_model_from_string(part)
    model.ir_version = 10  # onnx writes newer ones than onnxruntime reads
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [one.name for one in session.get_inputs()] == ["blocks.0/Add_1"]
    assert [one.name for one in session.get_outputs()] == ["blocks.1/Add_1"]
    (out,) = session.run(None, {"blocks.0/Add_1": np.ones((1, 4, 8), np.float32)})
    assert out.shape == (1, 4, 8)


def test_large_constants_are_named_and_left_out(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_part, "INLINE", 100)
    model = onnx.load_model_from_string(graph_part.extract(files / "a.onnx", {"blocks.1.attn.to_q/MatMul"}))
    (weight,) = model.graph.initializer
    assert (list(weight.dims), weight.raw_data, weight.external_data[0].value) == ([8, 8], b"", graph_part.LEFT_OUT)
    assert len(model.SerializeToString()) < 600


# -- pages -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_passes_shows_what_each_did(files: Path) -> None:
    found = dumped(files / "passes")
    assert [name for name, _ in found] == ["linear", "no_ops", "qdq", "dynamic_quantize"]
    page = graph_page.passes_page(files / "passes", found, "blocks.1").decode()
    assert re.findall(r'data-name="(\w+)"', page) == ["qdq", "dynamic_quantize"]
    assert "left it as it was: no_ops." in page
    assert "<small>1 added, 2 changed</small>" in page and "<small>1 added</small>" in page
    untouched = graph_page.passes_page(files / "passes", found, "blocks.2").decode()
    assert "No pass changed blocks.2" in untouched and 'class="step"' not in untouched
    assert "data-zoom" not in untouched.partition("<script>")[0]
    with pytest.raises(UnknownNameError):
        graph_page.passes_page(files / "passes", found, "blocks.7")


def test_names_are_text_and_pages_repeat(files: Path, tmp_path: Path) -> None:
    model = quantized_linear()
    node(model, "proj/MatMul").name = "<script>alert(1)</script>\"'"
    onnx.save_model(model, str(tmp_path / "odd.onnx"))
    page = graph_page.graph_page(tmp_path / "odd.onnx")
    assert b"<script>alert" not in page and b"&lt;script&gt;alert" in page
    assert page == graph_page.graph_page(tmp_path / "odd.onnx")
    assert b"http" not in re.sub(rb"http-equiv", b"", page), "nothing is fetched"


def test_graphs_too_large_for_a_picture_say_what_to_do(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_page, "WHOLE", 20)
    assert b"blocks.0 of a.onnx" in graph_page.graph_page(files / "a.onnx"), "the first block"
    monkeypatch.setattr(graph_page, "MOST", 10)
    with pytest.raises(VdqError, match="19 operators, too many"):
        graph_page.graph_page(files / "a.onnx")
    page = graph_page.diff_page(files / "a.onnx", files / "b.onnx").decode()
    assert "not drawn" in page and ": blocks.1.</p>" in page


def test_diff_of_large_graphs_draws_the_blocks_that_changed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_page, "WHOLE", 20)
    page = graph_page.diff_page(files / "a.onnx", files / "b.onnx").decode()
    assert re.findall(r'data-name="([\w.]+)"', page) == ["blocks.1"]
    page = graph_page.diff_page(files / "a.onnx", files / "b.onnx", "blocks.2").decode()
    assert re.findall(r'data-name="([\w.]+)"', page) == ["blocks.2"] and "nothing changed" in page


def test_diff_of_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tiny_bundle.write(tmp_path / "a")
    monkeypatch.setattr(tiny_bundle, "gain", lambda index: 5.0 if index == 2 else 2.0**index)
    b = tiny_bundle.write(tmp_path / "b")
    done = CliRunner().invoke(diff_command, [str(a.path), str(b.path), "--html", str(tmp_path / "d.html")])
    page = (tmp_path / "d.html").read_text(encoding="utf-8")
    assert 'download="first.body.bin02.onnx"' in page and 'download="second.body.bin02.onnx"' in page
    assert done.exit_code == 1 and "Side by side: bin02" in page and "gain: 4 -&gt; 5 (+25.000%)" in page
    assert len(re.findall(r'class="box changed"', page)) == 2
    same = graph_page.diff_page(a.path, a.path).decode()
    assert "Same: the two bundles are equal." in same and "<svg" not in same


def test_diff_of_bundles_has_a_row_for_each_pair_of_graphs(tmp_path: Path) -> None:
    a, b = tiny_bundle.write(tmp_path / "a"), tiny_bundle.write(tmp_path / "b", edges=tiny_bundle.EDGES[:3])
    page = graph_page.diff_page(a.path, b.path).decode()
    rows = re.findall(r"<tr[^>]*><th>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", page)
    graphs = {what: sides for what, *sides in rows if what.startswith("bin")}
    assert list(graphs) == ["bin00", "bin01", "bin02", "bin03"]
    assert graphs["bin00"] == ["5 operators, linears quantized: 0 of 1, f32 16,388 B, int64 24 B"] * 2
    assert graphs["bin03"][0] and not graphs["bin03"][1]


def test_commands(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    for arguments in ([files / "passes", "--block", "blocks.1"], [files / "a.onnx"], [files / "b.onnx"]):
        done = CliRunner().invoke(inspect_command, [*map(str, arguments), "--html", str(out)])
        assert done.exit_code == 0 and b"<svg" in out.read_bytes(), done.output
        out.unlink()
    assert CliRunner().invoke(inspect_command, [str(files / "a.onnx"), "--block", "blocks.1"]).exit_code == 2
    asked = ("diff", files / "a.onnx", files / "b.onnx", "--html", out, "--block", "blocks.9")
    code, _, err = command(*asked, cwd=tmp_path)
    assert (code, out.exists()) == (2, False) and "unknown block 'blocks.9'" in err


@needs_chromium
def test_a_browser_shows_it(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_page, "WHOLE", 20)
    passes, sides = tmp_path / "passes.html", tmp_path / "sides.html"
    passes.write_bytes(graph_page.passes_page(files / "passes", dumped(files / "passes"), "blocks.1"))
    sides.write_bytes(graph_page.diff_page(files / "a.onnx", files / "b.onnx"))
    done = run_node(HOST / "graph_page.mjs", CHROMIUM, tmp_path / "seen.json", passes, sides)
    assert (done.returncode, done.stderr) == (0, "")
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    for one in seen:
        assert (one["complaints"], set(one["requests"]) - {"data"}) == ([], {"file"})
        assert one["twins"] == 2 and one["box"].startswith("MatMul  blocks.1.") and "f32[1,4,8]" in one["box"]
        assert one["line"].endswith("f32[1,4,8]")
        assert one["zoomed"][1] == pytest.approx(1.25 * one["zoomed"][0])
        assert one["opened"] == one["zoomed"][0] and one["zoomed"][2] <= one["room"]
        assert (one["dark"], one["wide"], one["wideOnPhone"]) == ("rgb(20, 23, 26)", False, False)
    assert [one["steps"] for one in seen] == [2, 1]
    assert (seen[0]["first"].split()[0], seen[0]["second"].split()[0]) == ("qdq", "dynamic_quantize")
    assert "retyped" in seen[0]["changed"] or "Neg" in seen[0]["changed"] or "parameter" in seen[0]["changed"]
    assert seen[1]["filtered"] == "0 of 3" and seen[1]["download"] == "a.blocks.1.onnx"


def test_the_link_holds_the_part(files: Path) -> None:
    page = graph_page.graph_page(files / "a.onnx", "blocks.2").decode()
    (data,) = re.findall(r"base64,([^\"]+)", page)
    model = onnx.load_model_from_string(base64.b64decode(data))
    assert len(model.graph.node) == 19 and model.graph.input[0].name == "blocks.1/Add_1"
