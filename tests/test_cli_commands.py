"""The subcommands: what each refuses before it works, and what a person reads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

from tests.commands import MODEL, InProcess, assert_one_line, finish, start
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.commands.console import WHOLE
from vdq_export.commands.export import _text
from vdq_export.commands.plan import print_plan
from vdq_export.graph import Graph
from vdq_export.plan import QuantPlan
from vdq_export.report.data import KernelCount, VerifyReport


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traced: Graph) -> InProcess:
    return InProcess(monkeypatch, capsys, traced)


@pytest.mark.parametrize("command", ["run", "report"])
def test_another_models_clips_are_not_compared(command: str, made: Path, inside: InProcess) -> None:
    """Clips of other weights would be told as a PSNR against float."""
    found = inside(command, made / "bundle", "--model", "tests.clip_model:other")
    assert_one_line(found, "tests.clip_model:other has other weights", "pass its own model")


@pytest.mark.parametrize("name", ["plan.json", "graph.textproto", "graph.onnxtxt", "empty.onnx"])
@pytest.mark.parametrize("command", ["inspect", "lint", "diff", "verify"])
def test_what_is_no_graph(command: str, name: str, inside: InProcess, tmp_path: Path) -> None:
    """onnx itself reads by suffix, and fails otherwise for every one."""
    path = tmp_path / name
    path.write_text("" if name == "empty.onnx" else '{"a": 1}', encoding="utf-8")
    more = {"lint": ["--for", "qnn-v75"], "diff": [path], "verify": ["--device", "htp-emulator", "--bisect"]}
    if command == "verify" and name != "empty.onnx":
        pytest.skip("only .onnx files go there, others are bundles")
    assert_one_line(inside(command, path, *more.get(command, [])), name, "not an ONNX file")


def test_lint_asks_for_what_it_needs(made: Path, inside: InProcess, tmp_path: Path) -> None:
    assert_one_line(inside("lint", tmp_path / "nosuch"), "nosuch: no such file or folder", "give a bundle")
    assert_one_line(inside("lint", made / "bundle"), "no rules for target 'ort-int8'", "--for, one of ", "qnn-v75")


@pytest.fixture
def some_float(made: Path) -> Bundle:
    """A bundle whose plan has a layer in float in its second bin alone."""
    bundle = Bundle.open(made / "bundle")
    layers = list(bundle.plan.layers)
    place = next(i for i, one in enumerate(layers) if one.name == "blocks.0.attn1.to_v")
    layers[place] = replace(layers[place], float_in=("", "it is weak there"))
    return dataclasses.replace(bundle, plans=(replace(bundle.plan, layers=tuple(layers)),))


def _told(plan: QuantPlan, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr("vdq_export.commands.plan.console", lambda: Console(width=width, highlight=False))
    print_plan(plan)
    return capsys.readouterr().out


def test_a_plan_in_a_pipe_has_a_line_a_layer(
    some_float: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = {line.split()[0]: line for line in _told(some_float.plan, WHOLE, monkeypatch, capsys).splitlines()}
    assert [layer.name for layer in some_float.plan.layers if layer.name not in lines] == []
    weak = next(layer for layer in some_float.plan.layers if layer.name == "blocks.0.attn1.to_v")
    assert f"{weak.activation[0].scale:.3g} float" in lines[weak.name]
    assert lines[weak.name].rstrip().endswith("bin01: it is weak there")
    kept = next(layer for layer in some_float.plan.layers if layer.keep_float)
    assert lines[kept.name].rstrip().endswith(kept.keep_float)


def test_a_plan_on_a_narrow_terminal_cuts_no_name(
    some_float: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _told(some_float.plan, 60, monkeypatch, capsys)
    assert max(map(len, shown.splitlines())) <= 60
    assert [layer.name for layer in some_float.plan.layers if layer.name not in shown.splitlines()] == []
    assert "bin01: it is weak there" in " ".join(shown.split())


def test_an_export_counts_what_is_in_float_in_some_bins(some_float: Bundle) -> None:
    assert " in float" in _text(some_float)
    assert " and 1 (layer, bin) in float" in _text(some_float)


def test_whoever_reads_may_stop(made: Path) -> None:
    """Exit 1 would be an answer."""
    for how in ([], ["--json"]):
        process = start("inspect", made / "bundle", *how, cwd=made)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        code, _, err = finish(process)
        assert (code, err) == (141, "")


# -- refused before any work -----------------------------------------------------------------------------------------

REFUSED = {
    "bundle as a model": (["export", "BUNDLE"], ["is a bundle", "vdq-export verify"]),
    "misspelt sample": (["plan", "sampel:digits"], ["did you mean sample:digits?"]),
    "no such bits": (["export", MODEL, "--activations", "999"], ["unknown number of bits '999'", "mixed"]),
    "record that is none": (["export", MODEL, "--calibration", "own.safetensors"], ["own.safetensors is no calib"]),
    "two records": (
        ["export", MODEL, "--calibration", "whole.safetensors", "--save-calibration", "new.safetensors"],
        ["say one of them"],
    ),
    "bundle in a bundle": (["export", MODEL, "--out", "BUNDLE/inner"], ["is inside the bundle"]),
    "encodings in a bundle": (["encodings", "BUNDLE", "--out", "BUNDLE/e"], ["is inside the bundle"]),
    "clips in a bundle": (["run", "BUNDLE", "--out", "BUNDLE/graphs"], ["is inside the bundle"]),
    "page over a graph": (["inspect", "BUNDLE", "--html", "BUNDLE/graphs/prompt.onnx"], ["prompt.onnx"]),
    "findings over a file": (
        ["lint", "BUNDLE", "--sarif", "own.safetensors"],
        ["exists and is no .sarif"],
    ),
    "recipe over a file": (["bisect", "BUNDLE", "--gain", "1", "--out", "own.safetensors"], ["is no .toml file"]),
    "nowhere to write": (["bisect", "BUNDLE", "--gain", "1", "--out", "/proc/x.toml"], ["/proc/x.toml cannot be wri"]),
    "nowhere to work": (["export", MODEL, "--work", "/proc/x"], ["/proc/x cannot be written"]),
    "folder as a recipe": (["export", MODEL, "--recipe", "folder"], ["folder is no recipe", ".toml"]),
    "no recipe file": (["export", MODEL, "--recipe", "static-asq.toml"], ["no such file", "without .toml"]),
    "ALL": (["export", MODEL, "--dump-after", "ALL"], ["did you mean all?"]),
    "provider of another build": (["run", "BUNDLE", "--providers", "CUDAExecutionProvider"], ["has no CUDAExec"]),
    "emulator of another target": (
        ["verify", "BUNDLE", "--device", "htp-emulator"],
        ["made for ort-int8, not"],
    ),
    "no shell": (["completion"], ["one of bash, zsh, fish"]),
    "encodings version": (["encodings", "BUNDLE", "--version", "3.0.0"], ["did you mean 2.0.0"]),
    "guidance": (["export", MODEL, "--guidance", "nan"], ["nan"]),
    "gain": (["bisect", "BUNDLE", "--gain", "inf"], ["inf"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(
    case: str, made: Path, inside: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "/proc/" in str(REFUSED[case]) and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vdq_export.compiler.make_plan", None)  # and so no trace either
    (tmp_path / "folder").mkdir()
    (tmp_path / "own.safetensors").write_bytes(b"mine")
    shutil.copy(made / "record.safetensors", "whole.safetensors")
    arguments, words = REFUSED[case]
    bundle = str(made / "bundle")
    if case in ("folder as a recipe", "no recipe file"):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    assert_one_line(inside(*(one.replace("BUNDLE", bundle) for one in arguments)), *words)
    assert (tmp_path / "own.safetensors").read_bytes() == b"mine"
    Bundle.open(bundle)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "own.safetensors", "whole.safetensors"]


def test_a_report_tells_machines(made: Path, inside: InProcess, tmp_path: Path) -> None:
    shutil.copytree(made / "bundle", tmp_path / "b")
    kernels = KernelCount(planned=1, executed=1)
    report = VerifyReport(verdict="fail", bundle_bytes=1, integer_kernels=kernels, failures=("x",))
    Bundle.open(tmp_path / "b").attach("report/report.json", report.to_json())
    code, out, err = inside("report", tmp_path / "b", "--clips", "0", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert Path(told["page"]).stat().st_size == told["bytes"]
    assert told["verdict"] == "fail"


def test_an_empty_folder_is_taken_and_another_one_is_told_so(inside: InProcess, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with BundleWriter(tmp_path / "empty") as writer:
        writer._committed = True
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, _, err = inside("export", MODEL, "--out", tmp_path / "full")
    assert code == 2 and "is not a bundle and is never replaced" in err and "--force" not in err
