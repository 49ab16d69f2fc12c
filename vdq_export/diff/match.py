"""Which operator of one graph is which operator of another, without trusting names.

Legend: an operator's *label* is what it is by itself; its *signature* adds its neighbourhood. Labels come in three
grades: strict (type, attributes, parameters by hash), shaped (parameters by dtype and shape), bare (type only).

Signatures are Weisfeiler-Lehman colours. `down` sees everything an operator depends on, `up` everything that depends
on it, a ring both ways for r steps. One edit changes `down` only below it and `up` only above it, so together they
still recognise all the rest; with many edits the small rings take over. From strict to bare, signatures found exactly
once on each side anchor a pair, names break ties among equals, then depth does, and every pair is spread to its
neighbours. What is left is paired if it sits in the same place (retyped), else it was added or removed.

Each step is linear in the edges, up to the sorting of neighbours; there is no search. `match` is symmetric: it orders
the two graphs by content first.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from vdq_export.graphs.view import INPUT, OUTPUT, GraphView, Op, Param

RADII = (6, 3, 1)
_LOOK = 32  # consumers looked at when asking whether a pair contradicts its neighbours; values read by all are rare
Label = Hashable
Source = Param | tuple[int, int] | None  # what a slot reads: a parameter, (operator, its output slot), or nothing


class Side:
    """One graph as lists by operator index; the order is topological."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.network: nx.MultiDiGraph = view.network()
        count = sum(isinstance(node, int) for node in self.network)
        self.ops: list[Op] = [self.network.nodes[index]["op"] for index in range(count)]
        self.sources: list[list[Source]] = [[self._source(value) for value in op.inputs] for op in self.ops]
        self.readers: list[list[tuple[int, int, int]]] = [[] for _ in self.ops]  # (my output slot, reader, its slot)
        for index, sources in enumerate(self.sources):
            for slot, source in enumerate(sources):
                if isinstance(source, tuple):
                    self.readers[source[0]].append((source[1], index, slot))
        self.depth: list[int] = []  # operators on the longest way from an input
        for sources in self.sources:
            self.depth.append(1 + max((self.depth[s[0]] for s in sources if isinstance(s, tuple)), default=0))

    def _source(self, value: str) -> Source:
        if not value:
            return None
        for maker, _, slot in self.network.in_edges(value, keys=True):
            return (maker, slot)
        return self.view.params[value]


@dataclass
class Matching:
    """`to_b[i]` is the operator of b that i of a became; `to_a` the other way round."""

    a: Side
    b: Side
    to_b: dict[int, int]
    to_a: dict[int, int]


def match(a: Side, b: Side) -> Matching:
    """Pairs of operators; each operator is in at most one pair."""
    if _content(a) > _content(b):
        found = _Matcher(b, a).run()
        return Matching(a, b, found.to_a, found.to_b)
    return _Matcher(a, b).run()


def _content(side: Side) -> list[tuple[Any, ...]]:
    digests = [tuple(s.digest for s in sources if isinstance(s, Param)) for sources in side.sources]
    return [(op.type, op.name, op.attrs, op.inputs, one) for op, one in zip(side.ops, digests, strict=True)]


@dataclass(frozen=True)
class Patch:
    """Unpaired operators that hang together, and the paired ones they read and feed."""

    members: set[int]
    reads: set[int]
    feeds: set[int]


def patches(side: Side, paired: dict[int, int]) -> list[Patch]:
    """All unpaired operators of one side, by connected patch."""
    loose = nx.Graph()
    loose.add_nodes_from(i for i in range(len(side.ops)) if i not in paired)
    makers = {i: {s[0] for s in side.sources[i] if isinstance(s, tuple)} for i in loose}
    loose.add_edges_from((i, maker) for i, found in makers.items() for maker in found if maker not in paired)
    result = []
    for members in nx.connected_components(loose):
        reads = {maker for i in members for maker in makers[i]} - members
        feeds = {reader for i in members for _, reader, _ in side.readers[i]} - members
        result.append(Patch(members, reads, feeds))
    return result


class _Matcher:
    def __init__(self, a: Side, b: Side) -> None:
        self.a, self.b = a, b
        self.to_b: dict[int, int] = {}
        self.to_a: dict[int, int] = {}
        self.ids: dict[Hashable, int] = {}  # both sides intern colours here, so equal colours are equal integers
        self.fresh: deque[tuple[int, int]] = deque()

    def run(self) -> Matching:
        self._pair_ends()
        for grade in (_strict, _shaped, _bare):
            labels = [self.intern(grade(op, sources)) for op, sources in zip(self.a.ops, self.a.sources, strict=True)]
            others = [self.intern(grade(op, sources)) for op, sources in zip(self.b.ops, self.b.sources, strict=True)]
            self._mark_ends(labels, others)
            self._grade(labels, others, checked=grade is not _strict)
        self._spread_all(labels, others, force=True)
        for index in range(len(self.a.ops)):
            if index not in self.to_b:
                self._retype(index)
                self._spread(labels, others, force=True)
        self._between(labels, others)
        return Matching(self.a, self.b, self.to_b, self.to_a)

    def intern(self, colour: Hashable) -> int:
        return self.ids.setdefault(colour, len(self.ids))

    def pair(self, i: int, j: int) -> None:
        self.to_b[i], self.to_a[j] = j, i
        self.fresh.append((i, j))

    def _pair_ends(self) -> None:
        """Graph inputs and outputs are an interface: paired by name, the renamed ones by type and order."""
        for kind in (INPUT, OUTPUT):
            mine = {op.name: i for i, op in enumerate(self.a.ops) if op.type == kind}
            theirs = {op.name: j for j, op in enumerate(self.b.ops) if op.type == kind}
            for name in mine.keys() & theirs.keys():
                self.pair(mine.pop(name), theirs.pop(name))
            for same_type in (True, False):
                left = dict(theirs)
                for name, i in list(mine.items()):
                    for other, j in left.items():
                        if not same_type or self.a.view.types.get(name) == self.b.view.types.get(other):
                            self.pair(i, j)
                            del left[other], theirs[other], mine[name]
                            break

    def _mark_ends(self, labels: list[int], others: list[int]) -> None:
        for i, j in self.to_b.items():
            if self.a.ops[i].type in (INPUT, OUTPUT):
                labels[i] = others[j] = self.intern(("end", i))

    def _grade(self, labels: list[int], others: list[int], *, checked: bool) -> None:
        down, down_b = self._down(self.a, labels), self._down(self.b, others)
        up, up_b = self._up(self.a, labels), self._up(self.b, others)
        both = list(zip(down, up, strict=True))
        both_b = list(zip(down_b, up_b, strict=True))
        self._anchor(both, both_b, labels, others, checked=False)
        self._anchor_rest(both, both_b, labels, others, checked=False)
        self._anchor(down, down_b, labels, others, checked=checked)
        self._anchor(up, up_b, labels, others, checked=checked)
        rings, rings_b = self._rings(self.a, labels), self._rings(self.b, others)
        for radius in RADII:
            self._anchor(rings[radius], rings_b[radius], labels, others, checked=checked)
        named = [(label, op.name) for label, op in zip(labels, self.a.ops, strict=True)]
        named_b = [(label, op.name) for label, op in zip(others, self.b.ops, strict=True)]
        self._anchor(named, named_b, labels, others, checked=False)
        self._anchor(labels, others, labels, others, checked=checked)
        for radius in RADII:
            self._anchor_rest(rings[radius], rings_b[radius], labels, others, checked=True)

    def _anchor(
        self, mine: Sequence[Label], theirs: Sequence[Label], labels: list[int], others: list[int], *, checked: bool
    ) -> None:
        """Pair operators whose signature is theirs alone, then namesakes among equals; spread what was found."""
        for left, right in self._groups(mine, theirs):
            if len(left) != 1 or len(right) != 1:
                left, right = self._namesakes(left, right)
            for i, j in zip(left, right, strict=True):
                if not checked or self._agrees(i, j):
                    self.pair(i, j)
        self._spread(labels, others)

    def _anchor_rest(
        self, mine: Sequence[Label], theirs: Sequence[Label], labels: list[int], others: list[int], *, checked: bool
    ) -> None:
        """As many look-alikes here as there (blocks in a row, twins): pair by depth, each with its neighbours."""
        for left, right in self._groups(mine, theirs):
            if len(left) != len(right):
                continue
            left.sort(key=self.a.depth.__getitem__)
            right.sort(key=self.b.depth.__getitem__)
            for i, j in zip(left, right, strict=True):
                if i not in self.to_b and j not in self.to_a and (not checked or self._agrees(i, j)):
                    self.pair(i, j)
                    self._spread(labels, others)

    def _groups(self, mine: Sequence[Label], theirs: Sequence[Label]) -> Iterable[tuple[list[int], list[int]]]:
        left, right = defaultdict(list), defaultdict(list)
        for i, signature in enumerate(mine):
            if i not in self.to_b:
                left[signature].append(i)
        for j, signature in enumerate(theirs):
            if j not in self.to_a:
                right[signature].append(j)
        return [(left[signature], right[signature]) for signature in left if signature in right]

    def _namesakes(self, left: list[int], right: list[int]) -> tuple[list[int], list[int]]:
        named = {self.b.ops[j].name: j for j in right}
        pairs = {i: named.pop(self.a.ops[i].name) for i in left if self.a.ops[i].name in named}
        return list(pairs), list(pairs.values())

    def _agrees(self, i: int, j: int) -> bool:
        """At least one paired neighbour confirms the pair, or there is none to ask."""
        asked = False
        for mine, theirs in zip(self.a.sources[i], self.b.sources[j], strict=False):
            if isinstance(mine, tuple) and isinstance(theirs, tuple) and mine[0] in self.to_b:
                asked = True
                if self.to_b[mine[0]] == theirs[0]:
                    return True
        readers = {reader for _, reader, _ in self.b.readers[j]}
        for _, reader, _ in self.a.readers[i][:_LOOK]:
            if reader in self.to_b:
                asked = True
                if self.to_b[reader] in readers:
                    return True
        return not asked

    def _spread_all(self, labels: list[int], others: list[int], *, force: bool) -> None:
        self.fresh.extend(self.to_b.items())
        self._spread(labels, others, force=force)

    def _spread(self, labels: list[int], others: list[int], *, force: bool = False) -> None:
        """From each new pair to the operators in the same slots beside it, while their labels agree."""
        while self.fresh:
            i, j = self.fresh.popleft()
            for mine, theirs in zip(self.a.sources[i], self.b.sources[j], strict=False):
                if (
                    isinstance(mine, tuple) and isinstance(theirs, tuple)
                    and mine[1] == theirs[1] and labels[mine[0]] == others[theirs[0]]
                    and mine[0] not in self.to_b and theirs[0] not in self.to_a
                ):  # fmt: skip
                    self.pair(mine[0], theirs[0])
            left, right = defaultdict(list), defaultdict(list)
            for slot, reader, its in self.a.readers[i]:
                if reader not in self.to_b:
                    left[slot, its, labels[reader]].append(reader)
            for slot, reader, its in self.b.readers[j]:
                if reader not in self.to_a:
                    right[slot, its, others[reader]].append(reader)
            for place in left:
                self._pair_readers(left[place], right.get(place, []), force)

    def _pair_readers(self, left: list[int], right: list[int], force: bool) -> None:
        left = [i for i in left if i not in self.to_b]
        right = [j for j in right if j not in self.to_a]
        if len(left) == len(right) == 1:
            self.pair(left[0], right[0])
            return
        for i, j in zip(*self._namesakes(left, right), strict=True):
            self.pair(i, j)
        if force:
            rest = [j for j in right if j not in self.to_a]
            for i, j in zip([i for i in left if i not in self.to_b], rest, strict=False):
                self.pair(i, j)

    def _retype(self, i: int) -> None:
        """Pair i with an operator of any type in its place: same producers, and the same readers or the same name."""
        sources = [s for s in self.a.sources[i] if isinstance(s, tuple)]
        if not sources or any(s[0] not in self.to_b for s in sources):
            return
        readers = {(slot, self.to_b.get(reader), its) for slot, reader, its in self.a.readers[i]}
        wanted = [(self.to_b[maker], slot) for maker, slot in sources]
        for _, j, _ in self.b.readers[wanted[0][0]]:
            if j in self.to_a or [s for s in self.b.sources[j] if isinstance(s, tuple)] != wanted:
                continue
            if self.a.ops[i].name == self.b.ops[j].name or readers == set(self.b.readers[j]):
                self.pair(i, j)
                return

    def _between(self, labels: list[int], others: list[int]) -> None:
        """Patches of unpaired operators between the same paired ones: pair what is alike in them, by depth."""
        mine = {(frozenset(self.to_b[i] for i in p.reads), frozenset(self.to_b[i] for i in p.feeds)): p
                for p in patches(self.a, self.to_b)}  # fmt: skip
        for patch in patches(self.b, self.to_a):
            twin = mine.pop((frozenset(patch.reads), frozenset(patch.feeds)), None)
            if twin is None:
                continue
            alike: dict[int, deque[int]] = defaultdict(deque)
            for j in sorted(patch.members, key=self.b.depth.__getitem__):
                alike[others[j]].append(j)
            for i in sorted(twin.members, key=self.a.depth.__getitem__):
                if alike[labels[i]]:
                    self.pair(i, alike[labels[i]].popleft())

    def _down(self, side: Side, labels: list[int]) -> list[Label]:
        colours: list[Label] = []
        for label, sources in zip(labels, side.sources, strict=True):
            seen = tuple((slot, s[1], colours[s[0]]) for slot, s in enumerate(sources) if isinstance(s, tuple))
            colours.append(self.intern((label, seen)))
        return colours

    def _up(self, side: Side, labels: list[int]) -> list[Label]:
        colours = list(labels)
        for index in reversed(range(len(labels))):
            seen = sorted((slot, its, colours[reader]) for slot, reader, its in side.readers[index])
            colours[index] = self.intern((labels[index], tuple(seen), "up"))
        return list(colours)

    def _rings(self, side: Side, labels: list[int]) -> dict[int, list[Label]]:
        rings: dict[int, list[Label]] = {}
        colours = list(labels)
        for radius in range(1, max(RADII) + 1):
            before = colours
            colours = []
            for index, sources in enumerate(side.sources):
                above = tuple((slot, s[1], before[s[0]]) for slot, s in enumerate(sources) if isinstance(s, tuple))
                below = tuple(sorted((slot, its, before[reader]) for slot, reader, its in side.readers[index]))
                colours.append(self.intern((before[index], above, below)))
            rings[radius] = list(colours)
        return rings


def _strict(op: Op, sources: list[Source]) -> Label:
    params = tuple((k, str(s.type), s.digest) for k, s in enumerate(sources) if isinstance(s, Param))
    return op.type, op.attrs, len(sources), params


def _shaped(op: Op, sources: list[Source]) -> Label:
    params = tuple((slot, str(s.type)) for slot, s in enumerate(sources) if isinstance(s, Param))
    return op.type, op.attrs, len(sources), params


def _bare(op: Op, sources: list[Source]) -> Label:
    return op.type
