"""Structural difference of two ONNX graphs or two bundles: what a person would say changed, whatever it is called.

Renaming nodes, values or weights is no difference; it is counted. Weights compare by hash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from vdq_export.bundle import Bundle
from vdq_export.diff.bins import pair_graphs
from vdq_export.diff.match import Matching, Side, Source, match, patches
from vdq_export.diff.values import describe, difference, role, settings
from vdq_export.errors import VdqError
from vdq_export.graphs import view as graph_view
from vdq_export.graphs.view import INPUT, OUTPUT, GraphView, Op, Param, TensorType
from vdq_export.manifest import MANIFEST

Kind = Literal["added", "removed", "rewired", "retyped", "parameter", "schedule", "plan", "manifest"]
_BOOKKEEPING = {"files", "tools"}  # of the manifest: differs whenever anything does, or says nothing about the graphs


class Change(msgspec.Struct, frozen=True, omit_defaults=True):
    """One edit. `where` is the operator (or setting) in the first graph, in the second one where it was added.

    also: other operators that read the constant which changed.
    """

    kind: Kind
    where: str
    detail: str
    also: tuple[str, ...] = ()


class Difference(msgspec.Struct, frozen=True):
    """`counts` has one entry per kind that occurs.

    `renamed`: operators with another name, and `renamed_io` the graph inputs and outputs among them ("old -> new"): no
    difference, but callers feed by name. `follow_on`: values whose type changed only because that of their inputs did.
    """

    a: str
    b: str
    what: Literal["graph", "bundle"]
    same: bool
    counts: dict[Kind, int]
    changes: tuple[Change, ...]
    renamed: int = 0
    renamed_io: tuple[str, ...] = ()
    follow_on: int = 0

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


@dataclass(frozen=True)
class Comparison:
    """What differs between two graphs, and which operator of one is which of the other.

    edited: for each change the operators it names, by index in the first graph; in the second where they were added.
    """

    difference: Difference
    matching: Matching
    edited: tuple[frozenset[int], ...]


def diff(a: Path, b: Path) -> Difference:
    """Compare two ONNX files or two bundle folders.

    Raises VdqError when that is impossible: a path is missing, no ONNX file or bundle, damaged, or one of each.
    """
    kinds = [_what(Path(path)) for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise VdqError(f"{a} is a {kinds[0]}, {b} a {kinds[1]}", hint="compare two graphs or two bundles")
    if kinds[0] == "graph":
        return diff_views(graph_view.load(Path(a)), graph_view.load(Path(b)))
    return _diff_bundles(Bundle.open(a, verify_hashes=False), Bundle.open(b, verify_hashes=False))


def diff_views(a: GraphView, b: GraphView) -> Difference:
    """Compare two graphs already loaded."""
    return compare(a, b).difference


def compare(a: GraphView, b: GraphView) -> Comparison:
    """Compare two graphs already loaded, operator by operator."""
    matching = match(Side(a), Side(b))
    edits = _Edits(matching)
    found = edits.all()
    changes = tuple(change for change, _ in found)
    names = [(one.type, one.name, other.name) for one, other in edits.pairs() if one.name != other.name]
    renamed_io = tuple(f"{old} -> {new}" for kind, old, new in names if kind in (INPUT, OUTPUT))
    counts = _counts(changes)
    difference = Difference(
        a.origin, b.origin, "graph", not changes, counts, changes, len(names), renamed_io, edits.follow_on
    )
    return Comparison(difference, matching, tuple(frozenset(ops) for _, ops in found))


def _what(path: Path) -> Literal["graph", "bundle"]:
    if not path.exists():
        raise VdqError(f"{path}: no such file or folder")
    if not path.is_dir():
        return "graph"
    if (path / MANIFEST).is_file():
        return "bundle"
    raise VdqError(f"{path}: a folder without {MANIFEST}", hint="give an .onnx file or the folder vdq-export wrote")


def _counts(changes: Iterable[Change]) -> dict[Kind, int]:
    return dict(sorted(Counter(change.kind for change in changes).items()))


def _diff_bundles(a: Bundle, b: Bundle) -> Difference:
    changes: list[Change] = []
    pairs: dict[str, Difference] = {}
    digests: graph_view.Digests = {}
    for label, old_graph, new_graph in pair_graphs(a, b):
        if old_graph is None or new_graph is None:
            kind: Kind = "added" if old_graph is None else "removed"
            path = old_graph or new_graph
            changes.append(Change(kind, label, f"graph {path.name if path else ''}: no counterpart"))
            continue
        views = (graph_view.load(x, root=y.path, digests=digests) for x, y in ((old_graph, a), (new_graph, b)))
        one = pairs[label] = diff_views(*views)
        changes += [replace(change, where=f"{label}: {change.where}") for change in one.changes]
    changes += _settings("schedule", _plain(a.schedule), _plain(b.schedule))
    if len(a.plans) != len(b.plans):
        changes.append(Change("plan", "plans", f"{len(a.plans)} -> {len(b.plans)}"))
    for old_plan, new_plan in zip(a.plans, b.plans, strict=False):
        changes += _settings("plan", _plain(old_plan), _plain(new_plan))
    old, new = ({k: v for k, v in _plain(x.manifest).items() if k not in _BOOKKEEPING} for x in (a, b))
    changes += _settings("manifest", old, new)
    changes += _tables(a, b)
    return Difference(
        a=str(a.path),
        b=str(b.path),
        what="bundle",
        same=not changes,
        counts=_counts(changes),
        changes=tuple(changes),
        renamed=sum(one.renamed for one in pairs.values()),
        renamed_io=tuple(f"{label}: {text}" for label, one in pairs.items() for text in one.renamed_io),
        follow_on=sum(one.follow_on for one in pairs.values()),
    )


def _tables(a: Bundle, b: Bundle) -> Iterator[Change]:
    old, new = ({e.path: e.sha256 for e in x.manifest.files if e.path.startswith("tables/")} for x in (a, b))
    for where, detail in settings(old, new):
        yield Change("parameter", where, detail)


def _plain(data: msgspec.Struct) -> Any:
    return msgspec.to_builtins(data)


def _settings(kind: Kind, old: Any, new: Any) -> list[Change]:
    return [Change(kind, where or kind, detail) for where, detail in settings(old, new)]


class _Edits:
    """Turns a matching into changes, each with the operators that it is of: see Comparison."""

    def __init__(self, matching: Matching) -> None:
        self.m = matching
        self.a, self.b = matching.a, matching.b
        self.follow_on = 0
        self.readers: dict[tuple[str, str], list[int]] = {}  # of a parameter (of a, of b): one change, however many
        self.entries_a = _entries(self.a, matching.to_b)
        self.entries_b = _entries(self.b, matching.to_a)

    def pairs(self) -> Iterator[tuple[Op, Op]]:
        return ((self.a.ops[i], self.b.ops[j]) for i, j in sorted(self.m.to_b.items()))

    def all(self) -> list[tuple[Change, list[int]]]:
        found = list(self._all())  # only then it is known of every parameter who reads it
        names = [tuple(self.a.ops[i].name for i in ops[1:]) for _, ops in found]
        return [(replace(change, also=also), ops) for (change, ops), also in zip(found, names, strict=True)]

    def _all(self) -> Iterator[tuple[Change, list[int]]]:
        yield from self._opsets()
        for index, op in enumerate(self.a.ops):
            if index not in self.m.to_b:
                yield Change("removed", op.name, _describe(self.a, index)), [index]
            else:
                yield from self._pair(index, self.m.to_b[index])
        for index, op in enumerate(self.b.ops):
            if index not in self.m.to_a:
                yield Change("added", op.name, _describe(self.b, index)), [index]
        yield from self._order()

    def _opsets(self) -> Iterator[tuple[Change, list[int]]]:
        for domain, detail in settings(self.a.view.opsets, self.b.view.opsets):
            yield Change("retyped", f"opset {domain}", detail), []

    def _order(self) -> Iterator[tuple[Change, list[int]]]:
        """A caller may take outputs by position: the same outputs in another order are a difference."""
        outputs = {op.name: i for i, op in enumerate(self.a.ops) if op.type == OUTPUT}
        kept = [self.m.to_b[outputs[name]] for name in self.a.view.outputs if outputs[name] in self.m.to_b]
        moved = [self.b.ops[j].name for j in kept]
        if moved != [name for name in self.b.view.outputs if name in moved]:
            yield Change("rewired", "outputs", f"order {', '.join(moved)} -> {', '.join(self.b.view.outputs)}"), []

    def _pair(self, i: int, j: int) -> Iterator[tuple[Change, list[int]]]:
        old, new = self.a.ops[i], self.b.ops[j]
        retyped = [f"{old.type} -> {new.type}"] if old.type != new.type else []
        retyped += [f"{name}: {text}" for name, text in settings(dict(old.attrs), dict(new.attrs))]
        retyped += self._types(i, j)
        slots = max(len(self.a.sources[i]), len(self.b.sources[j]))
        for slot in range(slots):
            mine, theirs = _at(self.a, i, slot), _at(self.b, j, slot)
            if isinstance(mine, Param) and isinstance(theirs, Param):
                yield from self._param(i, role(old.type, slot, mine), mine, theirs)
            elif mine is not None and theirs is not None and not self._explained(mine, theirs):
                detail = f"input {slot}: {_source(self.a, mine)} -> {_source(self.b, theirs)}"
                yield Change("rewired", old.name, detail), [i]
            elif mine is None and theirs is not None and not self._unpaired(self.b, theirs):
                yield Change("rewired", old.name, f"input {slot}: absent -> {_source(self.b, theirs)}"), [i]
            elif theirs is None and mine is not None and not self._unpaired(self.a, mine):
                yield Change("rewired", old.name, f"input {slot}: {_source(self.a, mine)} -> absent"), [i]
        if retyped:
            yield Change("retyped", old.name, "; ".join(retyped)), [i]

    def _types(self, i: int, j: int) -> list[str]:
        """Changed output types, unless they merely follow from changed types of what the operator reads."""
        pairs = zip(self.a.ops[i].outputs, self.b.ops[j].outputs, strict=False)
        changed = [(s, t) for s, t in (self._type_pair(x, y) for x, y in pairs) if s and t and s != t]
        if not changed:
            return []
        read = zip(self.a.ops[i].inputs, self.b.ops[j].inputs, strict=False)
        if any(s and t and s != t for s, t in (self._type_pair(x, y) for x, y in read)):
            self.follow_on += len(changed)
            return []
        return [f"{s} -> {t}" for s, t in changed]

    def _type_pair(self, x: str, y: str) -> tuple[TensorType | None, TensorType | None]:
        return self.a.view.types.get(x), self.b.view.types.get(y)

    def _param(self, i: int, name: str, mine: Param, theirs: Param) -> Iterator[tuple[Change, list[int]]]:
        if mine.digest == theirs.digest and mine.type == theirs.type:
            return
        readers = self.readers.setdefault((mine.name, theirs.name), [])
        if i in readers:
            return
        readers.append(i)
        where = self.a.ops[i].name
        if len(readers) > 1:
            return
        if mine.type != theirs.type:
            yield Change("retyped", where, f"{name}: {mine.type} -> {theirs.type}"), readers
        else:
            yield Change("parameter", where, f"{name}: {difference(mine, theirs)}"), readers

    def _explained(self, mine: Source, theirs: Source) -> bool:
        """The slot reads the same thing, or what was put in, taken out or replaced there is reported by itself."""
        if isinstance(mine, Param) or isinstance(theirs, Param):
            return self._unpaired(self.a, mine) or self._unpaired(self.b, theirs)
        assert mine is not None and theirs is not None
        target = self.m.to_b.get(mine[0])
        if target is not None and theirs[0] in self.m.to_a:
            return target == theirs[0] and mine[1] == theirs[1]
        if target is not None:  # inserted: the new operators must lead back to what was read before
            return target in self.entries_b[theirs[0]]
        return theirs[0] not in self.m.to_a or self.m.to_a[theirs[0]] in self.entries_a[mine[0]]

    def _unpaired(self, side: Side, source: Source) -> bool:
        paired = self.m.to_b if side is self.a else self.m.to_a
        return isinstance(source, tuple) and source[0] not in paired


def _entries(side: Side, paired: dict[int, int]) -> dict[int, set[int]]:
    """For each unpaired operator: the paired operators that its patch of unpaired ones reads."""
    return {index: patch.reads for patch in patches(side, paired) for index in patch.members}


def _at(side: Side, index: int, slot: int) -> Source:
    sources = side.sources[index]
    return sources[slot] if slot < len(sources) else None


def _source(side: Side, source: Source) -> str:
    if source is None:
        return "absent"
    if isinstance(source, Param):
        return f"{source.name} {source.type}"
    op = side.ops[source[0]]
    name = f"input {op.name}" if op.type == INPUT else op.name
    return name if source[1] == 0 else f"{name}:{source[1]}"


def _describe(side: Side, index: int) -> str:
    op = side.ops[index]
    if op.type == INPUT:
        return f"graph input {side.view.types.get(op.name, '')}".rstrip()
    sources = side.sources[index]
    read = [describe(s) if isinstance(s, Param) else _source(side, s) for s in sources]
    if op.type == OUTPUT:
        return f"graph output, from {read[0]}"
    fed = [f"{side.ops[reader].name}:{slot}" for _, reader, slot in side.readers[index]]
    more = f" and {len(fed) - 3} more" if len(fed) > 3 else ""
    attrs = "".join(f" {name}={value}" for name, value in op.attrs)
    return f"{op.type}({', '.join(read)}){attrs} -> {', '.join(fed[:3]) or 'nothing'}{more}"
