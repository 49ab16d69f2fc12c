"""mkdocs calls these: made pages are added, sections of the navigation filled, links that leave docs/ turned."""

from __future__ import annotations

import os
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # mkdocs loads this file by its path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.site import pages

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[\w./-]+?)(#[\w.-]+)?\)")
_BARS = re.compile(r"(?<=[| ,])`([^`\n]*\\\|[^`\n]*)`")
_FETCHED = re.compile(r"<(?:script|img|iframe|source)[^>]*src=.https?:[^>]*>|<link[^>]*stylesheet[^>]*https?:[^>]*>")
_HOMES = (  # of the repository's files and folders, where they have a page
    (r"(passes|targets)/(\w+)\.py", r"\1/\2.md"),
    (r"calib/(\w+)\.py", r"stages/\1.md"),
    (r"benchmarks/(results/.+)", r"\1"),
    (r"docs/(.+)", r"\1"),
    ("passes", "passes.md"),
    ("vdq_export/commands", "reference/commands.md"),
    ("vdq_export/schemas", "reference/schemas.md"),
    (r"CONTRIBUTING\.md", "contributing.md"),
    (r"CHANGELOG\.md", "changes.md"),
)


def on_config(config: Any) -> Any:
    """Entries like "made: passes" of the navigation become the pages there are."""
    config.nav = _filled(config.nav)
    return config


def _filled(entries: Any) -> Any:
    if isinstance(entries, dict):
        return {title: _filled(below) for title, below in entries.items()}
    if isinstance(entries, list):
        found: list[Any] = []
        for one in entries:
            made = one.get("made") if isinstance(one, dict) else None
            found += pages.navigation(made) if made else [_filled(one)]
        return found
    return entries


def on_files(files: Files, config: Any) -> Files:
    for place, text in pages.generated().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links to files of the repository go to their pages here; of the others the path is left."""
    here = Path(page.file.src_uri).parent
    source = "benchmarks/results" if here.name == "results" else ("" if _top(page) else "docs" / here)

    def turned(found: re.Match[str]) -> str:
        place = os.path.normpath(Path(source) / found[2])
        page = home(place)
        return f"[{found[1]}]({os.path.relpath(page, here)}{found[3] or ''})" if page else f"{found[1]} (`{place}`)"

    if _top(page):  # files of the root: their links begin with docs/
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return _BARS.sub(_with_bars, _LINK.sub(turned, markdown))


def home(place: str) -> str:
    """The site's page of a file or folder of the repository; "" where it has none."""
    for pattern, page in _HOMES:
        if found := re.fullmatch(pattern, place):
            return found.expand(page)
    return ""


def _with_bars(found: re.Match[str]) -> str:
    """`a\\|b` in a table, as GitHub wants it written; Markdown here would show the backslash."""
    return "<code>" + escape(found[1].replace("\\|", "|"), quote=False).replace("|", "&#124;") + "</code>"


def _top(page: Page) -> bool:
    return page.file.src_uri in ("contributing.md", "changes.md")


def on_post_build(config: Any) -> None:
    """Nothing may be fetched when a page is opened. Raises PluginError that names what would be."""
    for path in Path(config.site_dir).rglob("*.html"):
        found = _FETCHED.search(path.read_text(encoding="utf-8"))
        if found:
            raise PluginError(f"{path}: {found[0]} would be fetched from the network")
