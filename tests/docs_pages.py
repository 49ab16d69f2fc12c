"""Markdown pages taken apart for the tests: code blocks, shell commands, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown.extensions.toc import slugify

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SHELLS = ("sh", "bash", "")
_INLINE = re.compile(r"`(vdq-export [^`\n]+)`")
_LINK = re.compile(r"(?<!`)!?\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """language: "" for indented and unnamed blocks; follows: nothing but blank lines is between it and the last."""

    language: str
    text: str
    line: int
    title: str = ""
    follows: bool = False


def name(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def blocks(text: str) -> list[Block]:
    """Fenced and indented code, in order."""
    found: list[Block] = []
    lines = text.splitlines()
    number, prose = 0, True  # prose: something else stood since the last block
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith("```"))
            language, _, rest = line[3:].partition(" ")
            title = rest.removeprefix('title="').removesuffix('"')
            found.append(Block(language, "\n".join(lines[number + 1 : end]), number + 1, title, not prose))
            number, prose = end + 1, False
        elif line.startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            found.append(Block("", "\n".join(one[4:] for one in lines[number:end]), number + 1, follows=not prose))
            number, prose = end, False
        else:
            prose = prose or bool(line.strip())
            number += 1
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a shell block: comments off, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    return [words for line in joined.splitlines() if (words := shlex.split(line.replace("…", ""), comments=True))]


def ours(page: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, arguments) of every vdq-export on a page: in shell blocks, and in `code` where nothing is left out."""
    text = page.read_text(encoding="utf-8")
    fenced = blocks(text)
    for block in fenced:
        if block.language in SHELLS and "vdq-export " in block.text and not _is_tree(block):
            for words in commands(block):
                if words[0] == "vdq-export":
                    yield block.line, _alone(words[1:])
    for line, content in enumerate(text.splitlines(), 1):
        for found in _INLINE.findall(content):
            if "…" not in found:
                yield line, _alone(shlex.split(found.replace("\\|", "|"))[1:])


def _alone(words: list[str]) -> list[str]:
    """Without what its output is given to."""
    ends = [place for place, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";")]
    return words[: ends[0]] if ends else words


def _is_tree(block: Block) -> bool:
    """Output or code that happens to be indented: its first word is no program."""
    return re.match(r"\w[\w-]*( |$)|[A-Z_]+=", block.text.lstrip()) is None


def anchors(text: str) -> set[str]:
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading), "-") for heading in _HEADING.findall(prose)}


def broken_links(page: Path) -> list[str]:
    """Links to files and headings that are not there, pages that the site alone has among them; addresses elsewhere
    are not asked."""
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for link in _LINK.findall(prose):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        known = target.exists() and (
            not anchor or target.suffix != ".md" or anchor in anchors(target.read_text("utf-8"))
        )
        broken += [] if known else [link]
    return broken


def differences(expected: str, actual: str) -> list[str]:
    """Lines of `expected` that do not follow one another in `actual`. "…" is any text, alone on a line any lines;
    blanks count once; numbers with a point may differ by a tenth."""
    have = [" ".join(line.split()) for line in actual.splitlines() if line.strip()]
    missing, free, place = [], True, 0
    for line in expected.splitlines():
        wanted = " ".join(line.split())
        if wanted in ("", "…"):
            free = free or wanted == "…"
            continue
        found = next((i for i in range(place, len(have)) if _alike(wanted, have[i])), None)
        if found is None or (found != place and not free):
            missing.append(line)
            continue
        place, free = found + 1, False
    return missing


_NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+")


def _alike(wanted: str, line: str) -> bool:
    pattern = "".join(
        ".*" if part == "…" else r"([-+]?\d+(?:\.\d+)?)" if _NUMBER.fullmatch(part) else re.escape(part)
        for part in re.split(r"(…|(?<![\w.])[-+]?\d+\.\d+)", wanted)
    )
    found = re.fullmatch(pattern, line)
    numbers = [float(one) for one in _NUMBER.findall(wanted)]
    return found is not None and all(
        abs(float(have) - want) <= 0.1 * abs(want) for have, want in zip(found.groups(), numbers, strict=True)
    )
