"""Pages that show graphs: a block of one, a block before and after each pass, two graphs or bundles side by side.

Each is one self-contained file. The pictures are SVG made by the templates from graph_draw; equal inputs give equal
pages.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdq_export.bundle import Bundle
from vdq_export.diff.bins import pair_graphs
from vdq_export.diff.compare import Change, Comparison, Difference, compare, diff
from vdq_export.diff.match import Side
from vdq_export.drawing import graph as graph_draw
from vdq_export.drawing.graph import Picture
from vdq_export.errors import VdqError
from vdq_export.graphs import part as graph_part
from vdq_export.graphs import view as graph_view
from vdq_export.graphs.view import GraphView
from vdq_export.inspect import GraphSummary, Summary, bundle_graphs, summarize
from vdq_export.manifest import MANIFEST
from vdq_export.report.environment import asset, fill

WHOLE = 250  # operators up to which a graph is drawn whole unless a block is named
MOST = 1500  # operators of one picture: beyond that nobody sees anything
ROWS = 1500  # changes listed; the rest is in --json
PICTURES = 6  # parts of a comparison that are drawn; the others are named

Row = tuple[str, str, str]  # what, of the first, of the second


@dataclass(frozen=True)
class Shown:
    """One picture with its caption, and the same part as an .onnx file in a link."""

    caption: str
    picture: Picture
    file: str
    data: str


@dataclass(frozen=True)
class Step:
    """Pictures side by side: one, or before and after."""

    name: str
    sides: tuple[Shown, ...]
    counts: str
    changes: tuple[Change, ...] = ()


def graph_page(path: Path, block: str | None = None) -> bytes:
    """A block of an .onnx file, or of a bundle's first bin; None: the whole of a small graph, else the first block.

    Raises UnknownNameError for a block that is not there, VdqError for more than can be drawn.
    """
    file, view = _opened(path)
    block = _chosen(view, block)
    side = Side(view)
    members = graph_draw.members(side, block)
    _check_size(members, block)
    shown = _shown(file, side, members, graph_draw.draw(view, block), file.name, block)
    step = Step(block or _WHOLE, (shown,), f"{len(members)} operators")
    return _render("graph.html", _about(path, block, [view], (step,), ()))


def passes_page(folder: Path, files: Sequence[tuple[str, Path]], block: str | None = None) -> bytes:
    """A block before and after each pass. files: (pass, the graph after it), in the order in which they ran.

    Passes that left the block as it was are named only. Raises what graph_page() does.
    """
    views = [graph_view.load(path) for _, path in files]
    block = _chosen(views[-1], block) if block is None else block
    if block is not None:
        graph_draw.check_block(views, block)
    steps, idle = [], []
    for (name, path), (before_name, before_path), new, old in zip(files[1:], files, views[1:], views, strict=False):
        found = compare(old, new)
        mine, theirs = (graph_draw.members(side, block) for side in (found.matching.a, found.matching.b))
        touched = graph_draw.touched(found)
        if not (touched[0] & mine or touched[1] & theirs):
            idle.append(name)
            continue
        _check_size(max(mine, theirs, key=len), block)
        sides = (f"before (as {before_name} left it)", f"after {name}")
        drawn = _pair((before_path, path), sides, found, (mine, theirs), block)
        steps.append(Step(name, drawn, _counts(drawn), _changes(found, mine, theirs)))
    return _render("graph.html", _about(folder, block, views[-1:], tuple(steps), tuple(idle)))


def diff_page(a: Path, b: Path, block: str | None = None) -> bytes:
    """Two graphs or two bundles side by side: facts, changes, and pictures of the blocks that changed, or of `block`.

    Of bundles the first bin that differs is drawn. Raises what diff() and graph_page() raise.
    """
    difference = diff(a, b)
    steps, rest, where = _drawn(a, b, difference, block)
    summaries = (summarize(a), summarize(b))
    values = {
        "title": f"{a.resolve().name} and {b.resolve().name}",
        "names": (a.resolve().name, b.resolve().name),
        "difference": difference,
        "facts": _facts(*summaries),
        "graphs": _graphs(a, b, summaries),
        "changes": difference.changes[:ROWS],
        "left_out": max(len(difference.changes) - ROWS, 0),
        "steps": steps,
        "rest": rest,
        "where": where,
    }
    return _render("diff.html", values)


def _drawn(a: Path, b: Path, difference: Difference, block: str | None) -> tuple[list[Step], list[str], str]:
    """(pictures, parts that changed and are not drawn, the graph they are of)"""
    pair = _first_different(a, b, difference, wanted=block is not None)
    if pair is None:
        return [], [], ""
    label, old, new = pair
    roots = [path if (path / MANIFEST).is_file() else None for path in (a, b)]
    views = [graph_view.load(file, root=root) for file, root in zip((old, new), roots, strict=True)]
    found = compare(*views)
    if block is not None:
        graph_draw.check_block(views, block)
        groups = {block: (graph_draw.members(found.matching.a, block), graph_draw.members(found.matching.b, block))}
    else:
        groups = _groups(found)
    steps, rest, room = list[Step](), list[str](), 2 * MOST
    for name, (mine, theirs) in groups.items():
        size = len(mine) + len(theirs)
        if len(steps) == PICTURES or size > room:
            if block is not None:
                _check_size(max(mine, theirs, key=len), block)
            rest.append(name)
            continue
        room -= size
        module = None if name in (_WHOLE, _ELSEWHERE) else name
        drawn = _pair((old, new), (str(a), str(b)), found, (mine, theirs), module)
        steps.append(Step(name, drawn, _counts(drawn), _changes(found, mine, theirs)))
    return steps, rest, label


_WHOLE, _ELSEWHERE = "whole graph", "outside the blocks"


def _groups(comparison: Comparison) -> dict[str, tuple[set[int], set[int]]]:
    """The blocks that changed, whole, and what changed elsewhere with what is beside it; all of graphs that are small.
    {name: (operators of the first graph, of the second)}"""
    touched = graph_draw.touched(comparison)
    sides = (comparison.matching.a, comparison.matching.b)
    if all(len(side.ops) <= WHOLE for side in sides):
        return {_WHOLE: (graph_draw.members(sides[0], None), graph_draw.members(sides[1], None))}
    groups: dict[str, tuple[set[int], set[int]]] = {}
    left = [set(one) for one in touched]
    for block in dict.fromkeys((*graph_draw.blocks(sides[0].view), *graph_draw.blocks(sides[1].view))):
        inner = [graph_draw.members(side, block) for side in sides]
        if any(one & members for one, members in zip(touched, inner, strict=True)):
            groups[block] = (inner[0], inner[1])
        left = [one - members for one, members in zip(left, inner, strict=True)]
    if any(left):
        beside = [one | _beside(side, one) for one, side in zip(left, sides, strict=True)]
        groups[_ELSEWHERE] = (beside[0], beside[1])
    return groups


def _beside(side: Side, chosen: set[int]) -> set[int]:
    makers = {source[0] for i in chosen for source in side.sources[i] if isinstance(source, tuple)}
    return makers | {reader for i in chosen for _, reader, _ in side.readers[i][:2]}


def _first_different(a: Path, b: Path, difference: Difference, wanted: bool) -> tuple[str, Path, Path] | None:
    """(label, file, file) of the first pair of graphs with a difference, any pair where one is `wanted` anyway."""
    if difference.what == "graph":
        return ("", a, b) if wanted or not difference.same else None
    graphs = pair_graphs(*(Bundle.open(path, verify_hashes=False) for path in (a, b)))
    both = [(label, old, new) for label, old, new in graphs if old is not None and new is not None]
    named = [one for one in both if any(c.where.startswith(f"{one[0]}: ") for c in difference.changes)]
    return next(iter(named or (both if wanted else ())), None)


def _pair(
    files: tuple[Path, Path],
    captions: tuple[str, str],
    comparison: Comparison,
    chosen: tuple[set[int], set[int]],
    block: str | None,
) -> tuple[Shown, ...]:
    pictures = graph_draw.draw_pair(comparison, *chosen, block or "")
    rows = zip(files, (comparison.matching.a, comparison.matching.b), chosen, pictures, captions, strict=True)
    shown = tuple(_shown(file, side, some, picture, text, block) for file, side, some, picture, text in rows)
    if files[0].name != files[1].name:
        return shown
    return tuple(
        replace(one, file=f"{which}.{one.file}") for which, one in zip(("first", "second"), shown, strict=True)
    )


def _shown(file: Path, side: Side, members: set[int], picture: Picture, caption: str, block: str | None) -> Shown:
    part = graph_part.extract(file, graph_draw.outputs(side, members))
    name = f"{file.stem}.{block}.onnx" if block else file.name
    return Shown(caption, picture, name, base64.b64encode(part).decode())


def _changes(comparison: Comparison, mine: set[int], theirs: set[int]) -> tuple[Change, ...]:
    found = zip(comparison.difference.changes, comparison.edited, strict=True)
    return tuple(change for change, ops in found if ops & (theirs if change.kind == "added" else mine))[:ROWS]


def _counts(drawn: Sequence[Shown]) -> str:
    before, after = (one.picture.counts for one in drawn)
    parts = (("removed", before["only"]), ("added", after["only"]), ("changed", after["changed"]))
    return ", ".join(f"{count} {what}" for what, count in parts if count) or "nothing changed"


def _chosen(view: GraphView, block: str | None) -> str | None:
    """`block`, or what is drawn when none is named. Raises UnknownNameError, and VdqError when one must be named."""
    if block is not None:
        graph_draw.check_block([view], block)
        return block
    if len(view.ops) <= WHOLE:
        return None
    found = graph_draw.blocks(view)
    if not found:
        raise VdqError(f"{view.origin}: {len(view.ops)} operators are too many for a picture", hint="name a --block")
    return found[0]


def _check_size(members: set[int], block: str | None) -> None:
    if len(members) > MOST:
        what = block or "the graph"
        raise VdqError(f"{what} has {len(members)} operators, too many for a picture", hint="name a smaller --block")


def _opened(path: Path) -> tuple[Path, GraphView]:
    """The .onnx file, that of a bundle's first bin, with its view."""
    if (path / MANIFEST).is_file():
        bundle = Bundle.open(path, verify_hashes=False)
        file = next(iter(bundle_graphs(bundle).values()))
        return file, graph_view.load(file, root=bundle.path)
    return path, graph_view.load(path)


def _about(
    path: Path, block: str | None, views: Sequence[GraphView], steps: tuple[Step, ...], idle: tuple[str, ...]
) -> dict[str, Any]:
    found = graph_draw.blocks(views[0])
    inner = (op.name.partition("/")[0] for op in views[0].ops if found and op.name.startswith(f"{found[0]}."))
    return {
        "title": f"{block or _WHOLE} of {path.resolve().name}",
        "block": block,
        "blocks": found,
        "example": next(inner, found[0] if found else ""),
        "steps": steps,
        "idle": idle,
    }


def _facts(a: Summary, b: Summary) -> list[Row]:
    """What the two are: bundles as a whole (their graphs have a table of their own), graphs in full."""
    sides = []
    for one in (a, b):
        if one.what == "bundle":
            facts = {"model": one.model, "target": one.target, "recipe": one.recipe, "graphs": str(len(one.graphs))}
        else:
            facts = _graph_facts(one.graphs[0])
        sides.append({**facts, "size": f"{one.size:,} B"})
    return [(key, sides[0].get(key, ""), sides[1].get(key, "")) for key in dict.fromkeys((*sides[0], *sides[1]))]


def _graph_facts(graph: GraphSummary) -> dict[str, str]:
    return {
        "operators": str(sum(graph.ops.values())),
        "linears quantized": f"{graph.linears_quantized} of {graph.linears}",
        "inputs": ", ".join(f"{name} {kind}" for name, kind in graph.inputs.items()),
        "outputs": ", ".join(f"{name} {kind}" for name, kind in graph.outputs.items()),
        "parameters": ", ".join(f"{kind} {count:,} B" for kind, count in graph.param_bytes.items()),
    }


def _graphs(a: Path, b: Path, summaries: tuple[Summary, Summary]) -> list[Row]:
    """Of two bundles, a row a pair of graphs, as diff() pairs them; of two graphs nothing."""
    if any(one.what != "bundle" for one in summaries):
        return []
    bundles = tuple(Bundle.open(path, verify_hashes=False) for path in (a, b))
    known: dict[Path | None, str] = {None: ""}  # a graph without a counterpart stands beside nothing
    for bundle, summary in zip(bundles, summaries, strict=True):
        known |= zip(bundle_graphs(bundle).values(), map(_in_short, summary.graphs), strict=True)
    return [(label, known[old], known[new]) for label, old, new in pair_graphs(*bundles)]


def _in_short(graph: GraphSummary) -> str:
    facts = _graph_facts(graph)
    return f"{facts['operators']} operators, linears quantized: {facts['linears quantized']}, {facts['parameters']}"


def _render(template: str, values: Mapping[str, Any]) -> bytes:
    return fill(template, {**values, "style": asset("graph.css"), "script": asset("graph.js")})
