"""Part of one graph, or the same part of two, as boxes and lines: what a template turns into SVG.

Two sides share one layout, so that what is in both stands at the same place in both pictures.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from vdq_export.diff.compare import Comparison
from vdq_export.diff.match import Side
from vdq_export.diff.values import describe, role
from vdq_export.drawing.layout import Layout, Point, layered
from vdq_export.errors import UnknownNameError
from vdq_export.graphs.view import INPUT, GraphView, Op, Param

Status = Literal["same", "changed", "only", "end"]  # only: not on the other side; end: where the part is cut off
LETTER, BOLD, LINE, PAD = 6.4, 7.1, 14.0, 8.0  # pixels of the type in boxes
LONGEST = 30  # letters in a box
_BLOCK = re.compile(r"(.*?\.\d+)(?=[./]|$)")  # blocks.3 of blocks.3.attn.to_q/MatMul
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_IN_BOTH = ("retyped", "rewired", "parameter")  # kinds of changes of operators that both graphs have


@dataclass(frozen=True)
class Box:
    """One operator, or an end of the part. x, y: upper left corner; lines: what stands in it; tip: on hover."""

    key: int
    x: float
    y: float
    width: float
    height: float
    lines: tuple[str, ...]
    tip: str
    status: Status


@dataclass(frozen=True)
class Line:
    """One value on its way from box to box; `path` is that of an SVG path."""

    path: str
    tip: str
    status: Status


@dataclass(frozen=True)
class Picture:
    """One side. counts: operators by status."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    counts: dict[str, int]


def blocks(view: GraphView) -> tuple[str, ...]:
    """The repeated parts of the network by their module paths, in the order of their first operator."""
    found = (match.group(1) for op in view.ops if (match := _BLOCK.match(op.name)))
    return tuple(sorted(dict.fromkeys(found), key=_numbered))


def members(side: Side, block: str | None) -> set[int]:
    """Operators of the module `block` ("blocks.0", "blocks.0.attn1"); None: all. {} where it has none."""
    inner = {i for i, op in enumerate(side.ops) if op.type != INPUT and op.outputs}
    return inner if block is None else {i for i in inner if is_in(side.ops[i].name, block)}


def is_in(name: str, block: str) -> bool:
    """Whether the operator belongs to the module."""
    return name == block or name.startswith((f"{block}.", f"{block}/"))


def check_block(views: Sequence[GraphView], block: str) -> None:
    """Raises UnknownNameError when none of the graphs has that module."""
    names = {op.name for view in views for op in view.ops}
    if not any(is_in(name, block) for name in names):
        known = {m for name in names for m in _modules(name)}
        raise UnknownNameError("block", block, known or {"(the operators have no module paths)"})


def draw(view: GraphView, block: str | None) -> Picture:
    """Raises UnknownNameError for a block that is not there."""
    if block is not None:
        check_block([view], block)
    part = _Part(Side(view), members(Side(view), block), block or "")
    boxes = part.keys()
    return part.picture(_layout([(part, boxes)]), boxes, {})


def draw_pair(
    comparison: Comparison, chosen: Collection[int], chosen_b: Collection[int], block: str = ""
) -> tuple[Picture, Picture]:
    """The operators `chosen` of one graph and `chosen_b` of the other, each with its partners, side by side."""
    matching = comparison.matching
    mine = set(chosen) | {matching.to_a[j] for j in chosen_b if j in matching.to_a}
    theirs = set(chosen_b) | {matching.to_b[i] for i in chosen if i in matching.to_b}
    a = _Part(matching.a, {i for i in mine if matching.a.ops[i].type != INPUT and matching.a.ops[i].outputs}, block)
    b = _Part(matching.b, {j for j in theirs if matching.b.ops[j].type != INPUT and matching.b.ops[j].outputs}, block)
    keys, keys_b = a.keys(), b.keys(matching.to_a)
    details: dict[int, list[str]] = {}
    for change, ops in zip(comparison.difference.changes, comparison.edited, strict=True):
        for i in ops if change.kind in _IN_BOTH else ():
            details.setdefault(i, []).append(f"{change.kind}: {change.detail}")
    details_b = {matching.to_b[i]: lines for i, lines in details.items()}
    try:
        layout = _layout([(a, keys), (b, keys_b)])
        layouts = (layout, layout)
    except ValueError:  # operators that changed their order: no place is right for both
        layouts = (_layout([(a, keys)]), _layout([(b, keys_b)]))
    return (
        a.picture(layouts[0], keys, details, set(matching.to_b)),
        b.picture(layouts[1], keys_b, details_b, set(matching.to_a)),
    )


def touched(comparison: Comparison) -> tuple[set[int], set[int]]:
    """Operators of the first and of the second graph that a change is of."""
    matching, found = comparison.matching, zip(comparison.difference.changes, comparison.edited, strict=True)
    mine = {i for change, ops in found if change.kind != "added" for i in ops}
    theirs = {j for j in range(len(matching.b.ops)) if j not in matching.to_a}
    return mine, theirs | {matching.to_b[i] for i in mine if i in matching.to_b}


def outputs(side: Side, chosen: Iterable[int]) -> set[str]:
    """Values that the operators make."""
    return {value for i in chosen for value in side.ops[i].outputs if value}


@dataclass
class _Part:
    """Some operators of one graph, and the ends where values come from elsewhere or go there.

    An end is ("in" or "out", operator, its slot): the operator that makes the value.
    """

    side: Side
    chosen: set[int]
    block: str
    edges: list[tuple[Any, Any, str]] = field(default_factory=list)  # from, to, value

    def __post_init__(self) -> None:
        for i in sorted(self.chosen):
            for slot, source in enumerate(self.side.sources[i]):
                if isinstance(source, tuple):
                    start = source[0] if source[0] in self.chosen else ("in", *source)
                    self.edges.append((start, i, self.side.ops[i].inputs[slot]))
            for slot in {s for s, reader, _ in self.side.readers[i] if reader not in self.chosen}:
                self.edges.append((i, ("out", i, slot), self.side.ops[i].outputs[slot]))
        self.quantized = _quantized(self.side)

    def keys(self, to_first: Mapping[int, int] | None = None) -> dict[Any, Any]:
        """Box -> its key in the common layout: the operator's number in the first graph, of those only in the second
        ("b", their own). None: this is the first."""
        count = range(len(self.side.ops))
        named: list[Any] = list(count) if to_first is None else [to_first.get(i, ("b", i)) for i in count]
        cut = [end for edge in self.edges for end in edge[:2] if isinstance(end, tuple)]
        ends = {end: (end[0], named[end[1]], end[2]) for end in cut}
        return {**{i: named[i] for i in self.chosen}, **ends}

    def sizes(self, keys: Mapping[Any, Any]) -> dict[Any, tuple[float, float]]:
        found = {}
        for box, key in keys.items():
            lines = self.lines(box)
            longest = max(BOLD * len(lines[0]), *(LETTER * len(line) for line in lines))
            found[key] = (longest + 2 * PAD, LINE * len(lines) + PAD)
        return found

    def lines(self, box: Any) -> tuple[str, ...]:
        if isinstance(box, tuple):
            op = self.side.ops[box[1]]
            value = op.outputs[box[2]]
            return (_short(value), _short(str(self.side.view.types.get(value, "?"))))
        op = self.side.ops[box]
        params = [s for s in self.side.sources[box] if isinstance(s, Param) and s.elements > 1]
        shown = max(params, key=lambda param: param.elements, default=None)
        name = op.name.removeprefix(self.block).lstrip("./") or op.name
        return (op.type, _short(name), *([_short(f"[{shown.type}]")] if shown else []))

    def picture(
        self,
        layout: Layout,
        keys: Mapping[Any, Any],
        changed: Mapping[int, Sequence[str]],
        paired: Collection[int] | None = None,
    ) -> Picture:
        """paired: operators that the other side has too; None without another side."""
        numbers = {key: number for number, key in enumerate(layout.places)}
        sizes = self.sizes(keys)
        status: dict[Any, Status] = dict.fromkeys(keys, "end")
        for i in self.chosen:
            alone = paired is not None and i not in paired
            status[i] = "only" if alone else "changed" if i in changed else "same"
        boxes = []
        for box, key in keys.items():
            x, y = layout.places[key]
            tip = self.tip_of_value(self.side.ops[box[1]].outputs[box[2]]) if isinstance(box, tuple) else self.tip(box)
            tip = "\n".join([*changed.get(box, ()), tip]) if not isinstance(box, tuple) else tip
            width, height = sizes[key]
            left, top = _round(x - width / 2), _round(y)
            boxes.append(Box(numbers[key], left, top, _round(width), height, self.lines(box), tip, status[box]))
        lines = [
            Line(_curve(layout.ways[keys[a], keys[b]]), self.tip_of_value(value), _of_line(status[a], status[b]))
            for a, b, value in self.edges
        ]
        counts = {one: sum(status[i] == one for i in self.chosen) for one in ("same", "changed", "only")}
        return Picture(_round(layout.width), _round(layout.height), tuple(boxes), tuple(lines), counts)

    def tip(self, i: int) -> str:
        """What an operator is, reads and makes, a line each."""
        op = self.side.ops[i]
        lines = [f"{op.type}  {op.name}", *(f"{name} = {value}" for name, value in op.attrs)]
        for slot, source in enumerate(self.side.sources[i]):
            if isinstance(source, Param):
                quantized = self.quantized.get(source.name)
                lines.append(
                    f"reads {role(op.type, slot, source)}: {describe(source)}" + (f", {quantized}" if quantized else "")
                )
            elif source is not None:
                lines.append(f"reads {self.tip_of_value(op.inputs[slot])}")
        return "\n".join([*lines, *(f"makes {self.tip_of_value(value)}" for value in op.outputs if value)])

    def tip_of_value(self, value: str) -> str:
        """Name, type and shape, and how it is quantized."""
        quantized = self.quantized.get(value)
        return f"{value}: {self.side.view.types.get(value, 'type unknown')}" + (f", {quantized}" if quantized else "")


def _quantized(side: Side) -> dict[str, str]:
    """Value or constant -> its quantization parameters, from the operators that quantize it or make it float again."""
    found: dict[str, str] = {}
    for op in side.ops:
        kind = op.type.rpartition("::")[2]
        if kind in _QUANTIZERS and len(op.inputs) > 1:
            text = _parameters(side.view, op, integer=op.outputs[0] if kind == "QuantizeLinear" else op.inputs[0])
            for value in (op.inputs[0], op.outputs[0]):
                found.setdefault(value, text)
    return found


def _parameters(view: GraphView, op: Op, integer: str) -> str:
    known = view.params[integer].type if integer in view.params else view.types.get(integer)
    parts = [f"quantized to {known.dtype}" if known else "quantized"]
    for name, slot in (("scale", 1), ("zero_point", 2)):
        value = op.inputs[slot] if slot < len(op.inputs) else ""
        if value in view.params:
            parts.append(f"{name} {_numbers(view.params[value])}")
        elif value:
            parts.append(f"{name} from {value}")
    attrs = dict(op.attrs)
    if "block_size" in attrs and attrs["block_size"] != "0":
        parts.append(f"blocks of {attrs['block_size']}")
    return ", ".join(parts)


def _numbers(param: Param) -> str:
    array = param.array()
    if array.size == 1:
        return f"{float(array.reshape(())):.6g}"
    low, high = float(array.min()), float(array.max())
    return f"{low:.6g}" if low == high else f"{low:.4g} … {high:.4g} ({array.size} values)"


def _layout(parts: Sequence[tuple[_Part, Mapping[Any, Any]]]) -> Layout:
    """One layout of all parts; a box is as large as its largest form."""
    sizes: dict[Any, tuple[float, float]] = {}
    edges: dict[tuple[Any, Any], None] = {}
    for part, keys in parts:
        for key, (width, height) in part.sizes(keys).items():
            old = sizes.get(key, (0.0, 0.0))
            sizes[key] = (max(old[0], width), max(old[1], height))
        edges |= dict.fromkeys((keys[a], keys[b]) for a, b, _ in part.edges)
    return layered(sizes, edges)


def _curve(points: Sequence[Point]) -> str:
    """Down through the points; between two of them an S whose ends are upright."""
    text = f"M{_round(points[0][0])} {_round(points[0][1])}"
    for (x, y), (to_x, to_y) in pairwise(points):
        middle = _round((y + to_y) / 2)
        end = f"{_round(to_x)} {_round(to_y)}"
        text += f"L{end}" if x == to_x else f"C{_round(x)} {middle} {_round(to_x)} {middle} {end}"
    return text


def _of_line(start: Status, end: Status) -> Status:
    return "only" if "only" in (start, end) else "end" if "end" in (start, end) else "same"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"


def _modules(name: str) -> Iterable[str]:
    path = name.partition("/")[0]
    parts = path.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))


def _numbered(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _round(number: float) -> float:
    return round(number, 1)
