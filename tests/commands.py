"""vdq-export as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdq_export import cli, compiler
from vdq_export.graph import Graph

ROOT = Path(__file__).parents[1]
MODEL = "tests.tiny_model:build"
# One thread: two pools of a few threads each on two cores only wait for each other.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def start(*arguments: str | Path, cwd: Path, code: str = "") -> subprocess.Popen[str]:
    """vdq-export with these arguments; `code` runs in the process before it."""
    script = f"{code}\nfrom vdq_export.cli import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def command(*arguments: str | Path, cwd: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    return finish(start(*arguments, cwd=cwd))


class InProcess:
    """main() in this process on a graph traced once: for what is refused after tracing, and for planted failures."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], graph: Graph) -> None:
        self.patch, self.capture = patch, capture
        patch.setattr(compiler, "trace", lambda model, **_: self.graph.copy())
        self.graph = graph

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.patch.setattr(sys, "argv", ["vdq-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = self.capture.readouterr()
        return int(str(stopped.value.code)), out, err


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
