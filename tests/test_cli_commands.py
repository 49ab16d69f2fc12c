"""The subcommands: what each refuses before it works, and what a person reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import InProcess, assert_one_line
from vdq_export.graph import Graph


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
