"""The package as docs/extend/*.md would leave it: their files written, their edits made, in a folder of its own."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.staging import ROOT

PAGES = sorted((ROOT / "docs/extend").glob("*.md"))
_BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_TOPS = ("passes", "calib", "targets", "samples")  # at the root of the repository; subpackages where installed


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, file, text) of every code block of a page that says which file it is of."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found[1], found[2], found[3]


def stage(folder: Path) -> Path:
    """vdq_export as it is installed, and tests beside it; no wheel is built. Returns the folder."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    for package, place in settings["package-dir"].items():
        shutil.copytree(ROOT / place, folder / package.replace(".", "/"), ignore=ignored, dirs_exist_ok=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def extend(folder: Path, page: Path) -> None:
    """Write and edit what one page says. Raises ValueError for an edit whose lines are not in the file, once."""
    for language, name, text in blocks(page):
        path = folder / (f"vdq_export/{name}" if name.startswith(_TOPS) else name)
        if language == "diff":
            path.write_text(edited(path.read_text(encoding="utf-8"), text, name), encoding="utf-8")
        elif path.exists():
            raise ValueError(f"{page.name}: {name} exists already")
        else:
            path.write_text(text, encoding="utf-8")


def edited(source: str, diff: str, name: str) -> str:
    """`source` with the lines of the diff exchanged."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    before = "".join(f"{line}\n" for mark, line in lines if mark != "+")
    after = "".join(f"{line}\n" for mark, line in lines if mark != "-")
    if source.count(before) != 1:
        raise ValueError(f"{name} has these lines {source.count(before)} times:\n{before}")
    return source.replace(before, after)
