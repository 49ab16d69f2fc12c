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
