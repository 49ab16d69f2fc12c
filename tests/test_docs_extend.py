"""docs/extend/*.md by the letter: their files, edits and commands, in a copy of the sources."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extended_sources import PAGES, ROOT, blocks, edited, extend, stage

_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = r"tests/test_(?:pass_squeezes|target_tiny_npu|calib_sigma|family_shortvideo)\.py"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages at once: they must not get in each other's way."""
    folder = stage(tmp_path_factory.mktemp("extended") / "copy")
    for page in PAGES:
        extend(folder, page)
    return folder


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commands() -> list[str]:
    """Every line of every shell block of the pages, in order."""
    return [line for page in PAGES for block in _SHELL.findall(page.read_text("utf-8")) for line in block.splitlines()]


def test_the_pages_commands_pass(extended: Path) -> None:
    """Those that run pytest in one process, since each start costs seconds; the others by themselves, before it."""
    tests: list[str] = []
    for command in commands():
        words = command.split()
        assert words[:2] == ["python", "-m"], command
        if words[2] != "pytest":
            run(extended, *words[1:])
        elif "-k" in words:
            tests += selected(words[3], words[5])
        else:
            tests += words[3:]
    assert sum(bool(re.fullmatch(OURS, one)) for one in tests) == 4
    out = run(extended, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", *tests)
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 11 and "skipped" not in out, out


def selected(file: str, word: str) -> list[str]:
    """What `-k word` leaves of `file`, as names that stand beside other files."""
    names = {
        "tests/test_pass_contract.py": (
            "test_file_declares_itself",
            "test_docstring_has_the_algebra_and_its_price",
            "test_pass_stands_in_the_order_exactly_once",
            "test_idempotent_deterministic_and_it_fires",
            "test_no_op_on_a_graph_it_does_not_concern",
        ),
        "tests/test_family_exports.py": ("test_a_network_without_a_pipeline_exports_in_eight_bits",),
    }
    return [f"{file}::{name}[{word}]" for name in names[file]]


def test_the_sources_copied_are_those_that_run(extended: Path) -> None:
    out = run(extended, "-c", "import vdq_export.passes.squeezes as s; print(s.__file__)")
    assert Path(out.strip()).is_relative_to(extended)


def test_every_page_adds_something_and_tests_it() -> None:
    assert len(PAGES) == 4
    for page in PAGES:
        names = [name for _, name, _ in blocks(page)]
        assert sum(name.startswith("tests/") for name in names) == 1 and len(names) >= 2, page.name


def test_an_edit_that_no_longer_fits_is_refused() -> None:
    assert edited("a\nb\n", " a\n-b\n+c\n", "x") == "a\nc\n"
    with pytest.raises(ValueError, match="0 times"):
        edited("a\nb\n", " a\n-c\n", "x")


def test_examples_are_not_in_the_package() -> None:
    """They are examples: a file of theirs in the repository would make the pages untrue."""
    for page in PAGES:
        assert not [name for language, name, _ in blocks(page) if language != "diff" and (ROOT / name).exists()]
