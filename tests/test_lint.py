"""The lint engine, its tables and reports, and the command. What the rows of Hexagon are worth: test_lint_qnn.py."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import hoisted_bundle, qnn_cases
from tests.commands import assert_one_line, command
from tests.lint_cases import MATMUL, RELU, Made, linear, product, unary
from tests.qdq_models import Builder
from vdq_export.errors import UnknownNameError, VdqError
from vdq_export.graph import Graph
from vdq_export.lint import LintReport, checks, lint_bundle, lint_graphs, profiles, signature, table
from vdq_export.lint.sarif import to_sarif
from vdq_export.lint.view import View

TABLE = """
name = "toy"
title = "A toy"
archs = ["one", "two"]
[[rule]]
id = "toy/relu"
severity = "warning"
kind = "advice"
ops = ["Relu*"]
archs = ["two"]
why = "Why."
fix = "Fix."
source = "document"
check = { name = "forbidden" }
[[operator]]
ops = ["Relu"]
types = ["u8|u16 -> *"]
source = "document"
"""


def graph(made: Made) -> Graph:
    return Graph.from_proto(made[0])


def lint(made: Made, profile: str = "qnn-v75") -> LintReport:
    return lint_graphs({"g.onnx": graph(made)}, profile)


# -- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", table.tables())
def test_every_row_of_every_table_is_whole(name: str) -> None:
    """Each check exists and takes its parameters; each row says why, what to do and how we know."""
    found = table.tables()[name]
    for rule in found.rule:
        assert isinstance(checks.of_rule(rule), checks.Check)
        assert all(len(text) > 8 for text in (rule.why, rule.fix, rule.source)), rule.id
    assert all(row.source and row.types for row in found.operator)


def test_every_wrong_result_is_no_mere_advice() -> None:
    rules = [rule for found in table.tables().values() for rule in found.rule]
    assert {rule.severity for rule in rules if rule.kind in ("refused", "fallback")} == {"error"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('why = "Why."', "", "why"),
        ('severity = "warning"', 'severity = "fatal"', "fatal"),
        ('id = "toy/relu"', 'id = "other/relu"', "toy/"),
        ('archs = ["two"]', 'archs = ["three"]', "three"),
        ('"u8|u16 -> *"', '"u8|u16"', "signature"),
        ('"u8|u16 -> *"', '"constant u8 -> *"', "operand"),
        ('title = "A toy"', 'titel = "A toy"', "titel"),
        ("[[rule]]", "[[rule]", "line"),
    ],
)
def test_a_damaged_table_is_refused(old: str, new: str, words: str) -> None:
    assert table.read(TABLE, "toy.toml").name == "toy"
    with pytest.raises(VdqError, match=words):
        table.read(TABLE.replace(old, new), "toy.toml")


@pytest.mark.parametrize(
    "check", [{"name": "forbiden"}, {"name": "max_rank"}, {"name": "max_rank", "limit": "five"}, {}]
)
def test_a_row_whose_check_does_not_fit_is_refused(check: dict[str, object]) -> None:
    rule = msgspec.structs.replace(table.read(TABLE, "toy.toml").rule[0], check=check)
    with pytest.raises(table.TableError, match="toy/relu"):
        checks.of_rule(rule)


def test_rows_of_one_architecture_hold_for_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "tables", lambda: {"toy": table.read(TABLE, "toy.toml")})
    assert profiles() == ["toy-one", "toy-two"]
    assert [finding.rule for finding in lint(RELU(), "toy-two").findings] == ["toy/relu"]
    assert lint(RELU(), "toy-one").findings == ()


def test_unknown_profiles_name_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="qnn-v75"):
        lint(RELU(), "qnn-v57")


# -- operand types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        ("u16, const s8/c -> u16", True),
        ("var u16, s8|s8/c -> *", True),
        ("u16, s8/c, s32? -> u16", True),
        ("*, * -> *", True),
        ("u16, var s8/c -> u16", False),
        ("u16, s8 -> u16", False),
        ("u16 -> u16", False),
        ("u16, s8/c -> u8", False),
        ("u16, s8/c, s32 -> u16", False),
        ("u16, ... -> u16", False),
    ],
)
def test_signatures(text: str, taken: bool) -> None:
    (unit,) = View(graph(MATMUL())).units
    assert signature.describe(unit) == "u16, const s8/c -> u16"
    assert signature.parse(text).takes(unit) is taken


@given(st.lists(st.sampled_from(["u8", "s8/c", "f32", "const s4/b", "var i64"]), min_size=1, max_size=4), st.booleans())
def test_a_repeated_slot_is_the_slot_written_out(slots: list[str], more: bool) -> None:
    """ "a, b, ..." takes what "a, b", "a, b, b" and so on take, and nothing else."""
    short = signature.parse(f"{', '.join(slots)}{', ...' if more else ''} -> *").inputs
    assert [short.more, len(short.slots)] == [more, len(slots)]
    assert short.slots == signature.parse(f"{', '.join(slots)} -> *").inputs.slots


def test_a_weight_quantized_in_the_graph_is_a_constant() -> None:
    b = Builder("uint8")
    weight = b.pair(b.constant(b.random(16, 4)), "int8")
    (unit,) = View(b.graph(b.op("MatMul", [b.input(8, 16), weight]))).units
    assert signature.describe(unit) == "u8, const s8 -> u8"


def test_types_that_numpy_lacks() -> None:
    made = linear(dtype="int4", axis=0, block=16)
    (unit,) = View(graph(made)).units
    assert signature.describe(unit) == "u16, const s4/b -> u16"


def test_shapes_a_file_leaves_out_are_inferred() -> None:
    model, feeds = unary("Relu", shape=(1, 2, 1, 2, 2, 4))
    del model.graph.value_info[:]
    assert "qnn/rank" in {finding.rule for finding in lint((model, feeds)).findings}


# -- findings --------------------------------------------------------------------------------------------------------


FOREIGN = """
<ir_version: 10, opset_import: ["": 21, "trt": 1]>
g (float[N, 8, 16] x, float[8] s, int64[N, M] i, bool c) => (float[N, 8, 16] y)
<float t = {0.1}, uint16 z = {0}, float[16] g = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}> {
    q = QuantizeLinear <axis = 1> (x, s)
    d = DequantizeLinear <axis = 1> (q, s)
    e = Add(d, x)
    n = LayerNormalization(e, g)
    m = QuantizeLinear(n, t, z)
    o = DequantizeLinear(m, t, z)
    r = Gather(o, i)
    f, h = trt.TRT_FP4DynamicQuantize <axis = 0, block_size = 16> (x, t)
    y = If (c) <
        then_branch = a () => (float[N, 8, 16] u) { u = Add(o, e) },
        else_branch = b () => (float[N, 8, 16] v) { v = Mul(o, e) }
    >
}
"""


@pytest.mark.parametrize("profile", profiles())
def test_foreign_graphs_with_named_sizes_computed_scales_and_branches_are_read(profile: str) -> None:
    found = lint_graphs({"g.onnx": Graph.from_proto(onnx.parser.parse_model(FOREIGN))}, profile)
    assert bool(found.findings) == (profile != "openvino-npu")  # which promises nothing


def test_a_finding_names_node_module_reason_and_remedy() -> None:
    (finding,) = lint(product("uint16", "uint16")).findings
    assert (finding.rule, finding.severity, finding.kind) == ("qnn/attention-u16", "error", "wrong")
    assert finding.node.startswith("block/MatMul") and (finding.op, finding.module) == ("MatMul", "block")
    assert finding.message == "MatMul with u16, u16 -> u16"
    assert "s16" in finding.fix and "onnxruntime-qnn 2.7.0" in finding.source


def test_what_several_graphs_share_is_said_once() -> None:
    bad, good = graph(product("uint16", "uint16")), graph(product("uint16", "int16"))
    report = lint_graphs({"a.onnx": bad, "b.onnx": good, "c.onnx": bad.copy()}, "qnn-v75")
    assert [finding.files for finding in report.findings] == [("a.onnx", "c.onnx")]


def test_a_catch_all_row_is_silent_where_another_spoke() -> None:
    """ScatterND is in no list of operators, but its own row says what to write instead."""
    report = lint(unary("Einsum", equation="abc->acb"))
    assert [finding.rule for finding in report.findings] == ["qnn/refused-operator"]


def test_an_operator_nobody_lists_is_an_error_even_without_quantization() -> None:
    node = onnx.helper.make_node("Celu", ["x"], ["y"], name="act")
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:]))
    assert [finding.rule for finding in lint((model, {})).findings] == ["qnn/operator"]


def test_a_hand_off_bundle_has_no_findings(tmp_path: Path) -> None:
    """Blocks that test_qnn_compile.py has the compiler take; two bins, the profile from the manifest."""
    report = lint_bundle(qnn_cases.write(tmp_path / "bundle"))
    assert (report.profile, report.findings, len(report.graphs)) == ("qnn-v75", (), 2)


def test_what_runs_ahead_of_the_bins_is_not_asked(tmp_path: Path) -> None:
    """It runs on the CPU, in float: asked, each `export --target qnn` of a model with a prompt would fail."""
    bundle = hoisted_bundle.write(tmp_path / "bundle", hoisted_bundle.Kind(with_probe=True))
    assert any("prompt" in one.path for one in bundle.manifest.files)
    assert lint_bundle(bundle, "qnn-v75").graphs == tuple(one.graph for one in bundle.schedule.bins)


def test_a_target_without_hand_off_has_no_profile(tmp_path: Path) -> None:
    bundle = qnn_cases.write(tmp_path / "bundle", target="reference")
    with pytest.raises(VdqError, match="--for"):
        lint_bundle(bundle)
    assert lint_bundle(bundle, "qnn-v79").findings == ()


# -- reports ---------------------------------------------------------------------------------------------------------


def test_json_holds_what_the_report_holds() -> None:
    report = lint(product("uint16", "uint16"))
    assert msgspec.json.decode(report.to_json(), type=LintReport) == report


def test_sarif() -> None:
    """The parts of SARIF 2.1.0 that readers rely on: rules by index, levels, places, one result a finding."""
    bad = graph(product("uint16", "uint16"))
    report = lint_graphs({"graphs/a.onnx": bad, "graphs/b.onnx": bad.copy(), "graphs/c.onnx": graph(RELU())}, "qnn-v75")
    log = json.loads(to_sarif(report))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [rule.id for rule in report.rules] and len(rules) > 40
    assert all(rule["defaultConfiguration"]["level"] in ("error", "warning") for rule in rules)
    (result,) = run["results"]
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "qnn/attention-u16"
    assert result["level"] == "error" and "s16" in result["message"]["text"]
    places = [place["physicalLocation"]["artifactLocation"]["uri"] for place in result["locations"]]
    assert places == ["graphs/a.onnx", "graphs/b.onnx"]
    names = {place["logicalLocations"][0]["fullyQualifiedName"] for place in result["locations"]}
    assert names == {report.findings[0].node}
    assert [a["location"]["uri"] for a in run["artifacts"]] == list(report.graphs)


def test_sarif_of_a_finding_about_the_whole_graph_has_no_node() -> None:
    b = Builder()
    made = (b.model(b.op("Relu", [b.weight(b.random(4, 4), "uint16")])), {})
    (result,) = json.loads(to_sarif(lint(made)))["runs"][0]["results"]
    assert result["ruleId"] == "qnn/no-inputs" and "logicalLocations" not in result["locations"][0]


# -- the command -----------------------------------------------------------------------------------------------------


def test_exit_codes_and_outputs(tmp_path: Path) -> None:
    """1 with errors, 0 with warnings only, 2 when the question makes no sense; --sarif and --json beside each other."""
    onnx.save(product("uint16", "uint16")[0], tmp_path / "bad.onnx")
    onnx.save(product("int16", "int16")[0], tmp_path / "slow.onnx")
    code, out, err = command("lint", "bad.onnx", "--for", "qnn-v75", "--json", "--sarif", "x.sarif", cwd=tmp_path)
    assert (code, err) == (1, "")
    assert [finding["rule"] for finding in json.loads(out)["findings"]] == ["qnn/attention-u16"]
    assert json.loads((tmp_path / "x.sarif").read_bytes())["version"] == "2.1.0"
    code, out, err = command("lint", "slow.onnx", "--for", "qnn-v79", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "warning qnn/unlike-output (slow)" in out and "0 errors, 1 warning in 1 graph for qnn-v79" in out
    assert_one_line(command("lint", "bad.onnx", cwd=tmp_path), "--for")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("missing.onnx", "--for", "qnn-v75"), "missing.onnx"), (("text.onnx", "--for", "qnn-v75"), "text.onnx")],
)
def test_files_that_are_no_model(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    assert_one_line(command("lint", *arguments, cwd=tmp_path), words)


def test_ranges_of_an_encoding() -> None:
    (unit,) = View(graph(unary("Reciprocal", "uint8", low=0.5, high=1.0))).units
    encoding = unit.inputs[0].encoding
    assert encoding is not None and encoding.range is not None
    np.testing.assert_allclose(encoding.range, (0.0, 1.0), atol=0.02)  # the largest of 128 draws is near 1
