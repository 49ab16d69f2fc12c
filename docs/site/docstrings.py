"""Docstrings of this project as Markdown: prose that may hold *, _ and <, indented forms that keep their columns."""

from __future__ import annotations

import ast
import re
from pathlib import Path

_LIST = re.compile(r"(?:[-*]|\d+\.) ")
_MARKED = re.compile(r"([\\*_<>\[\]#|])")


def docstring(path: Path) -> str:
    """The module's, dedented. Raises ValueError for a module without one."""
    found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not found:
        raise ValueError(f"{path} has no docstring")
    return found


def markdown(text: str) -> str:
    """Paragraphs as they are, their characters literal; indented lines as code blocks; list items kept apart."""
    made: list[str] = []
    for kind, lines in _blocks(text.splitlines()):
        if kind == "form":
            made.append("```text\n" + "\n".join(line[4:] for line in lines) + "\n```")
        else:
            made.append("\n".join(_prose(lines)))
    return "\n\n".join(made) + "\n"


def first_sentence(text: str) -> str:
    """What a list of pages says of one: up to the first full stop, on one line."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    return _literal(paragraph.split(". ", 1)[0].removesuffix("."))


def _blocks(lines: list[str]) -> list[tuple[str, list[str]]]:
    """Runs of lines: ("form", indented by four or more) or ("prose", others), blank lines between forms kept."""
    found: list[tuple[str, list[str]]] = []
    blank = False
    for line in lines:
        if not line.strip():
            blank = True
            continue
        kind = "form" if line.startswith("    ") else "prose"
        if found and found[-1][0] == kind and (kind == "form" or not blank):
            found[-1][1].extend([""] * (blank and kind == "form") + [line])
        else:
            found.append((kind, [line]))
        blank = False
    return found


def _prose(lines: list[str]) -> list[str]:
    made: list[str] = []
    in_list = False
    for line in lines:
        item = _LIST.match(line)
        if item and made and not in_list:
            made.append("")  # Markdown begins a list behind a blank line only
        in_list = in_list or bool(item)
        made.append(item[0] + _literal(line[item.end() :]) if item else _literal(line))
    return made


def _literal(text: str) -> str:
    """Characters that Markdown would take for marks, but for those in `code`."""
    return "".join(
        part if number % 2 else _MARKED.sub(r"\\\1", part) for number, part in enumerate(re.split(r"(`[^`]+`)", text))
    )
