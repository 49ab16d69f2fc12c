"""Finds the first operator on which a device's compiler and the exact evaluator disagree.

The graph is cut at its quantized values (graphs/cut.py). Which prefix of the operators first gives another result, or
first fails to compile, is found by halving; its last operator is then run alone, fed with the exact evaluator's own
values, so that no error of earlier operators is counted. Where it agrees alone, the operators before it are added until
it disagrees again: compilers fuse.

The whole graph is searched when the device is MARGIN_DB further from the unrounded graph than the exact evaluator is.
A part disagrees when, besides, the difference is more than a quantization step (root mean square), since roundings may
fall either way. Differences above a floor, which follows the graph's own output, are not what is looked for. When only
the whole graph disagrees and its last operator alone does not, roundings have added up: no operator is to blame.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx.reference

from vdq_export import ort
from vdq_export.errors import CompileError, ModelError
from vdq_export.graph import Array, Graph, Node, Value
from vdq_export.graphs.cut import Part, on_grid, operators, part, quantizer, read_values, settled, source, unquantized
from vdq_export.metrics import bounded_sqnr_db
from vdq_export.progress import Reporter
from vdq_export.report.device import Bisection, Quantizer, Suspect
from vdq_export.targets.qnn.emulate import EmulatorError, emulate

# Runs a graph on the device; without feeds it only compiles. Raises CompileError, EmulatorError for no result.
Runner = Callable[[Graph, Mapping[str, Array] | None], Mapping[str, Array]]
What = Literal["", "numbers", "accumulated", "refused", "no result"]

MARGIN_DB = 0.5  # what `verify --device` allows
HEADROOM_DB = 9.1  # noise so far below another adds the margin to it: smaller errors cannot cost as much
CEILING_DB = 55.0  # above it nothing counts


@dataclass(frozen=True)
class Outcome:
    """What came of running a part: "" for agreement. sqnr_db, error_steps: of the worst output."""

    what: What = ""
    message: str = ""
    sqnr_db: float | None = None
    error_steps: float | None = None


def bisect(
    graph: Graph,
    feeds: Mapping[str, Array],
    *,
    arch: str = "v75",
    label: str = "graph",
    ceiling_db: float = CEILING_DB,
    out: Path | None = None,
    run: Runner | None = None,
    reporter: Reporter | None = None,
) -> Bisection:
    """Search `graph`, fed with `feeds`, for the first operator on which the device disagrees.

    arch: of the emulator. run: another device than the emulator. label: how the result calls the graph. ceiling_db:
    agreement above which nothing counts. out: a folder for the suspect alone as NAME.onnx, with its feeds and the exact
    result in NAME.npz.
    Raises ModelError when a feed is missing, and for a graph without operators.
    """
    start = time.perf_counter()
    search = _Search(graph, feeds, run or partial(_emulated, arch), ceiling_db)
    with (reporter or Reporter()).stage(f"bisect {label}") as advance:
        search.advance = advance
        whole = search.outcome(search.operators)
        suspect = search.suspect(whole, out) if whole.what else None
    return Bisection(
        graph=label,
        operators=len(search.operators),
        floor_db=search.floor_db,
        exact_db=search.exact_db,
        device_db=search.device_db,
        runs=search.runs,
        seconds=time.perf_counter() - start,
        suspect=suspect,
    )


def _emulated(arch: str, graph: Graph, feeds: Mapping[str, Array] | None) -> Mapping[str, Array]:
    return emulate(graph, feeds, arch).outputs


class _Search:
    """One search: the graph with the exact and the unrounded array of every value, and the runs made so far."""

    def __init__(self, graph: Graph, feeds: Mapping[str, Array], run: Runner, ceiling_db: float) -> None:
        self.graph = _named(graph)
        self.operators = operators(self.graph)
        if not self.operators:
            raise ModelError(f"{graph.gs.name}: the graph has no operators", hint="there is nothing to search")
        names = [str(one.name) for one in graph.gs.inputs]
        if missing := [name for name in names if name not in feeds]:
            raise ModelError(f"no feed for the graph's input {missing[0]!r}", hint=f"it takes {', '.join(names)}")
        self._feeds = {name: feeds[name] for name in names}
        self.exact = _values(self.graph, self._feeds)
        self.unrounded = _values(unquantized(self.graph), self._feeds)
        self.exact_db = min(self._against_unrounded(one, self.exact[one.name]) for one in self.graph.gs.outputs)
        self.floor_db = min(ceiling_db, self.exact_db + HEADROOM_DB)
        self.device_db: float | None = None  # of the first run that gave a result: the whole graph's
        self.runs = 0
        self._run = run
        self.advance: Callable[[int, int | None], None] = lambda done, total: None

    def outcome(self, chosen: Sequence[Node], compile_only: bool = False) -> Outcome:
        """Run the operators `chosen` alone, fed with exact values, and compare."""
        cut = part(self.graph, [node.name for node in chosen], self.exact)
        self.runs += 1
        self.advance(self.runs, None)
        try:
            found = self._run(cut.graph, None if compile_only else self.feeds(cut))
        except EmulatorError as error:
            return Outcome("no result", str(error))
        except CompileError as error:
            return Outcome("refused", str(error))
        if compile_only:
            return Outcome()
        whole = len(chosen) == len(self.operators)
        if whole:
            self.device_db = min(self._against_unrounded(one, found[one.name]) for one in cut.graph.gs.outputs)
        return self._compare(cut, found, alone=len(chosen) == 1, whole=whole)

    def feeds(self, cut: Part) -> dict[str, Array]:
        """Exact values for the inputs of a part, on the grid of their quantizers."""
        values = self.graph.values()
        return {name: self.exact[on_grid(values[name]).name] for name in cut.inputs}

    def suspect(self, whole: Outcome, out: Path | None) -> Suspect:
        """The first operator that disagrees, given the outcome of the whole graph."""
        only = whole.what == "refused"

        def disagrees(chosen: Sequence[Node]) -> bool:
            what = self.outcome(chosen, compile_only=only).what
            return what == "refused" or (what != "" and not only)

        length = _first(1, len(self.operators), lambda count: disagrees(self.operators[:count]))
        culprit = self.operators[length - 1]
        before = _ancestors(culprit, self.operators[: length - 1])
        together: list[Node] = []
        outcome = self.outcome([culprit], compile_only=only)
        if not outcome.what:
            size = 1
            while size < len(before) and not disagrees([*before[-size:], culprit]):
                size *= 2
            size = _first(size // 2 + 1, min(size, len(before)), lambda n: disagrees([*before[-n:], culprit]))
            together = before[-size:]
            outcome = self.outcome([*together, culprit], compile_only=only)
        if outcome.what == "numbers" and length == len(self.operators) and len(together) == len(before) > 0:
            outcome = replace(outcome, what="accumulated")
        return self._describe(culprit, together, outcome, out)

    def _compare(self, cut: Part, found: Mapping[str, Array], *, alone: bool, whole: bool) -> Outcome:
        worst = Outcome()
        for one in cut.graph.gs.outputs:
            exact, actual = self.exact[one.name], found[one.name]
            sqnr = bounded_sqnr_db(exact, actual)
            if worst.sqnr_db is not None and sqnr >= worst.sqnr_db:
                continue
            steps = _error_steps(one, exact, actual)
            wrong = sqnr < self.floor_db and (whole or steps is None or steps > 1)
            if wrong and not alone:
                drop = self._against_unrounded(one, exact) - self._against_unrounded(one, actual)
                wrong = drop > MARGIN_DB
            what: What = "numbers" if wrong or worst.what else ""
            worst = Outcome(what, sqnr_db=sqnr, error_steps=steps)
        return worst

    def _against_unrounded(self, settled_value: Value, actual: Array) -> float:
        return bounded_sqnr_db(self.unrounded[source(settled_value).name], actual)

    def _describe(self, node: Node, together: Sequence[Node], outcome: Outcome, out: Path | None) -> Suspect:
        cut = part(self.graph, [one.name for one in (*together, node)], self.exact)
        feeds = self.feeds(cut)
        return Suspect(
            node=node.name,
            op=node.op,
            what=outcome.what or "numbers",
            inputs=tuple(_quantizer(one) for one in node.inputs if one.name),
            outputs=tuple(_quantizer(one) for value in node.outputs for one in settled(value)),
            together_with=tuple(one.name for one in together),
            sqnr_db=outcome.sqnr_db,
            error_steps=outcome.error_steps,
            arbiter_db=_arbiter(cut, feeds, self.exact),
            message=outcome.message,
            reproduction=_save(cut, node, feeds, self.exact, out) if out is not None else "",
        )


def _named(graph: Graph) -> Graph:
    """A copy whose operators have names, each its own: other exporters leave them out."""
    made = graph.copy()
    seen: set[str] = set()
    for node in made.gs.nodes:
        if not node.name or node.name in seen:
            node.name = made.fresh(node.name or node.op)
        seen.add(node.name)
    return made


def _values(graph: Graph, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """{name: array} of every value and every settled one, each operator run as it stands."""
    values = [*graph.gs.inputs, *(value for node in operators(graph) for value in node.outputs)]
    wanted = dict.fromkeys(str(one.name) for value in values for one in (value, *settled(value)) if one.name)
    names = [name for name in wanted if name not in feeds]
    kept = {name: array for name, array in feeds.items() if any(i.name == name for i in graph.gs.inputs)}
    return {**feeds, **ort.run(graph, kept, names, exact=True)}


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The lowest count in low … high for which `holds`, which is so for `high` and stays so once it is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high


def _ancestors(node: Node, earlier: Sequence[Node]) -> list[Node]:
    """Of the operators `earlier`, in graph order, those that `node` depends on."""
    needed = {id(value) for value in read_values(node)}
    found: list[Node] = []
    for one in reversed(earlier):
        if any(id(value) in needed for value in one.outputs):
            found.insert(0, one)
            needed |= {id(value) for value in read_values(one)}
    return found


def _error_steps(tensor: Value, exact: Array, actual: Array) -> float | None:
    """Root mean square of the difference in steps of the tensor's quantizer; None for a value without one."""
    encoding = quantizer(tensor)
    if encoding is None or not np.isfinite(actual).all():
        return None
    difference = np.subtract(exact, actual, dtype=np.float64) / float(encoding.scale.max())
    return float(np.sqrt(np.mean(np.square(difference))))


def _quantizer(tensor: Value) -> Quantizer:
    """The quantizer of an operator's input or output, constants included."""
    found = quantizer(tensor)
    name = str(source(tensor).name)
    if found is None:
        return Quantizer(value=name, dtype=str(np.dtype(tensor.dtype)) if tensor.dtype is not None else "float32")
    if found.scale.size > 1:
        return Quantizer(value=name, dtype=found.dtype, channels=int(found.scale.size))
    zero_point = int(found.zero_point.reshape(-1)[0])
    return Quantizer(value=name, dtype=found.dtype, scale=float(found.scale.reshape(-1)[0]), zero_point=zero_point)


def _arbiter(cut: Part, feeds: Mapping[str, Array], exact: Mapping[str, Array]) -> float | None:
    try:
        made = onnx.reference.ReferenceEvaluator(cut.graph.to_proto()).run(list(cut.outputs), dict(feeds))
    except Exception:  # it raises whatever its numpy code does; operators of other domains it has not
        return None
    return min(bounded_sqnr_db(array, exact[name]) for name, array in zip(cut.outputs, made, strict=True))


def _save(cut: Part, node: Node, feeds: Mapping[str, Array], exact: Mapping[str, Array], out: Path) -> str:
    """Write the part with its feeds ("in:NAME") and exact results ("out:NAME"); returns the model's file name."""
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", node.name)
    cut.graph.save(out / f"{name}.onnx")
    arrays = {f"in:{key}": array for key, array in feeds.items()}
    arrays |= {f"out:{key}": exact[key] for key in cut.outputs}
    np.savez(out / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return f"{name}.onnx"
