"""README.md and the gallery of samples: commands are taken by the program, links lead somewhere, `run` runs."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.docs_pages import ROOT, broken_links, ours
from tests.test_docs import parsed
from vdq_export.samples import digits

README = ROOT / "README.md"
GALLERY = ROOT / "samples/README.md"
SAMPLES = tuple(ROOT / "samples" / name / "README.md" for name in digits.NAMES)
PAGES = (README, GALLERY, *SAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_commands_are_taken_and_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for line, arguments in ours(page):
        try:
            parsed(arguments)
        except click.ClickException as error:
            wrong.append(f"{page.name}:{line}: {' '.join(arguments)}: {error.format_message()}")
    assert wrong == []
    assert broken_links(page) == []


def test_readme_stays_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    assert "vdq-export report" in text and "vdq-export bisect" in text and "--html" in text
    assert len(list(ours(README))) > 20


def test_every_sample_is_in_the_gallery() -> None:
    text = GALLERY.read_text(encoding="utf-8")
    for name in digits.NAMES:
        assert f"| [`sample:{name}`]" in text and f"\n| `sample:{name}` |" in text
        assert f"`samples/{name}/run`" in text


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script; its four lines are typed there")
@pytest.mark.parametrize("name", digits.NAMES)
def test_run_calls_four_commands_that_the_program_takes(name: str, tmp_path: Path) -> None:
    code, lines = run(tmp_path, name)
    said = [parsed(shlex.split(line)) for line in lines]
    assert code == 0 and [command for command, _ in said] == ["export", "verify", "run", "report"]
    assert said[0][1]["tsw"] == "4" and lines[0].startswith(f"sample:{name} ")
    assert all(f"out/{name}/bundle" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_run_stops_at_the_first_command_that_fails(tmp_path: Path) -> None:
    code, lines = run(tmp_path, "digits", fails="verify")
    assert code == 1 and len(lines) == 2


def run(folder: Path, name: str, fails: str = "") -> tuple[int, list[str]]:
    """(exit code, what it calls) of a sample's script, with a command in place of ours that says its arguments."""
    stub = folder / "bin/vdq-export"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@"\ntest "$1" != "{fails}"\n', encoding="utf-8")
    stub.chmod(0o755)
    path = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    script = [str(ROOT / "samples" / name / "run")]
    done = subprocess.run(script, cwd=folder, env=path, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout.splitlines()
