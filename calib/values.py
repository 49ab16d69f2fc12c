"""Ranges of every value, for targets that leave no operator in float.

Legend: S slots. Which values there are is known only behind the float passes (a smoothing or a rotation moves ranges
and adds values), so the graph they left runs over the trajectories once more. It computes each value's minimum and
maximum itself: the call returns two numbers a value, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import numpy as np
from msgspec.structs import replace

from vdq_export import ort
from vdq_export.calib.bins import bin_slots
from vdq_export.calib.constants import plan_constants
from vdq_export.calib.observe import iter_steps, step_feeds
from vdq_export.calib.ranges import Grid, affine
from vdq_export.calib.record import Slot, denoising_order, not_finite
from vdq_export.calib.trajectories import Runs
from vdq_export.errors import CalibrationError
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.model import Model
from vdq_export.plan import INT_RANGE, Conversion, IntType, QuantPlan, Range, ValuePlan
from vdq_export.target_spec import TargetSpec
from vdq_export.work import store as work_store
from vdq_export.work import units
from vdq_export.work.store import WorkStore

Progress = Callable[[int, int | None], None]
# Functions of bounded output -> (lowest, highest) of all grids: runtimes fix these quantizers whatever a graph says.
_BOUNDED = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
# Data passes through unchanged: compilers want one quantizer on both sides, or leave the integer domain.
_MOVES = {
    "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
SAME = 1e-3  # two ranges are one when their ends differ by less than this share of the range


@dataclass
class Extremes:
    """{value: {slot: (minimum, maximum)}} over the calls of one graph."""

    values: dict[str, dict[Slot, tuple[float, float]]]
    slots: tuple[Slot, ...]


def observe_values(
    graph: Graph,
    model: Model,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
    store: WorkStore | None = None,
) -> Extremes:
    """Run every step of the model's trajectories through the float `graph`. store: asked for the extremes first.

    Raises CalibrationError for NaN or Inf (value and timestep named) and for a model without trajectories.
    """
    runs = Runs(model)
    if store is None or runs.keys is None:  # to know that they are the same they would have to be made again
        return _observe(graph, model, progress, threads)
    unit = runs.chain(work_store.key("extremes", graph.hash(), threads))
    assert unit is not None
    table = units.once(store, unit, lambda: _table(_observe(graph, model, progress, threads)), _Table)
    slots = tuple(Slot(*one) for one in table.slots)
    ends = ((name, zip(slots, table.ends[index], strict=True)) for index, name in enumerate(table.names))
    return Extremes({name: {slot: (low, high) for slot, (low, high) in found} for name, found in ends}, slots)


class _Table(NamedTuple):
    """Extremes as they are kept: ends[value][slot]."""

    names: list[str]
    slots: list[tuple[float, Literal["cond", "uncond"]]]
    ends: list[list[tuple[float, float]]]


def _table(found: Extremes) -> _Table:
    ends = [[slots[slot] for slot in found.slots] for slots in found.values.values()]
    return _Table(list(found.values), [(slot.t, slot.branch) for slot in found.slots], ends)


def _observe(graph: Graph, model: Model, progress: Progress | None, threads: int | None) -> Extremes:
    watched = float_values(graph)
    names = [value.name for value in watched]
    probe, outputs = _with_extremes(graph, names)
    session = ort.session(probe, outputs=outputs, threads=threads)
    types = {one.name: one.type for one in session.get_inputs()}
    seen: dict[str, dict[Slot, tuple[float, float]]] = {name: {} for name in names}
    calls = 0
    for step, total in iter_steps(model):
        slot = Slot(float(step["t"]), step["branch"])
        found = session.run(outputs, step_feeds(step, types, slot))
        for index, name in enumerate(names):
            low, high = float(found[2 * index]), float(found[2 * index + 1])
            if not np.isfinite(low + high):
                readers = tuple(node.name for node in watched[index].outputs) or ("the output",)
                raise not_finite(name, readers, slot, "in the smoothed and rotated float graph")
            before = seen[name].get(slot, (low, high))
            seen[name][slot] = min(before[0], low), max(before[1], high)
        calls += 1
        if progress is not None:
            progress(calls, total)
    if not calls:
        raise CalibrationError(f"model {model.name} brought no trajectories", hint="calibration needs at least one")
    slots = tuple(sorted(next(iter(seen.values())), key=denoising_order))
    return Extremes(seen, slots)


def float_values(graph: Graph) -> list[Value]:
    """Every float value that a graph input or a node gives, in graph order."""
    made = [value for node in graph.nodes for value in node.outputs if value.name]
    found = [value for value in [*graph.gs.inputs, *made] if value.dtype == np.float32]
    unknown = next((v.name for v in made if v.dtype is None or v.shape is None), None)
    if unknown is not None:
        raise CalibrationError(f"type and shape of {unknown} are not known", hint="shape inference gave none")
    return found


def _with_extremes(graph: Graph, names: Sequence[str]) -> tuple[Graph, list[str]]:
    """A copy that also computes the minimum and maximum of each value; the names of those, two a value."""
    probe, outputs = graph.copy(), list[str]()
    values = probe.values()
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            made = probe.add_node(
                op, [values[name]], probe.fresh(f"{name}#{op}"), dtype=np.float32, shape=[], attrs={"keepdims": 0}
            )
            outputs.append(made.name)
            probe.gs.outputs.append(made)
    return probe, outputs


def plan_values(plan: QuantPlan, graph: Graph, extremes: Extremes, spec: TargetSpec) -> QuantPlan:
    """`plan` with the types and ranges of every value and constant of `graph`, the graph that was observed.

    A value gets the bits of the operator that makes it, and where that only moves its input about, the input's range.
    Readers of other bits, linears whose input range was searched narrower, and products of two computed operands (the
    second one: symmetric, when in 16 bits) get a conversion. A search has nothing to gain in 16 bits: there linears
    take the value's own range, and the plan's layers say so.
    """
    planner = _Planner(plan, extremes, spec)
    for value in float_values(graph):
        planner.add(value)
    constants = plan_constants(graph, lambda node: spec.activation_dtype[planner.bits(node)])
    layers = tuple(replace(x, activation=planner.given.get(x.name, x.activation)) for x in plan.layers)
    return replace(plan, layers=layers, values=tuple(planner.done.values()), constants=tuple(constants))


class _Planner:
    """Plans the values of one graph in their order; `done`: what it has, by name; `given`: the ranges that linears get
    instead of those of their layer plans."""

    def __init__(self, plan: QuantPlan, extremes: Extremes, spec: TargetSpec) -> None:
        self._recipe, self._spec, self._extremes = plan.recipe, spec, extremes.values
        self._layers = {layer.name: layer for layer in plan.layers if layer.quantized}
        self._bins = [[extremes.slots[i] for i in bin_slots(one, extremes.slots)] for one in plan.bins]
        self.done: dict[str, ValuePlan] = {}
        self.given: dict[str, tuple[Range, ...]] = {}

    def bits(self, node: Node) -> int:
        """Of the activations that a node reads and makes."""
        path = module_path(node)
        if path in self._layers:
            return self._layers[path].activation_bits
        if any(fnmatchcase(path, rule.match) for rule in self._recipe.kept_everywhere):
            return max(self._spec.activation_dtype)
        bits = self._recipe.activations.between or self._recipe.activations.bits
        for rule in self._recipe.override:
            if rule.activations and fnmatchcase(path, rule.match):
                bits = rule.activations
        return bits

    def add(self, value: Value) -> None:
        maker = value.inputs[0] if value.inputs else None
        readers = list({id(node): node for node in value.outputs}.values())
        bits = self.bits(maker) if maker else max((self.bits(node) for node in readers), default=8)
        dtype = self._spec.activation_dtype[bits]
        ranges, fixed = self._own(value, maker, dtype, bits)
        wishes: dict[tuple[IntType, tuple[Range, ...]], list[str]] = {}
        for node in readers:
            wish = self._wish(node, value, dtype)
            if wish is not None and not (wish[0] == dtype and _same(wish[1], ranges)):
                wishes.setdefault(wish, []).append(node.name)
        if len(wishes) == 1 and not fixed:
            [(kind, theirs), names] = next(iter(wishes.items()))
            if kind == dtype and len(names) == len(readers):
                ranges, wishes = theirs, {}  # nobody else reads it: the range that was searched is its own
        for node in readers:
            if self._linear(node) and not any(node.name in names for names in wishes.values()):
                self.given[module_path(node)] = ranges
        conversions = tuple(
            Conversion(dtype=kind, ranges=theirs, readers=tuple(names), why=_conversion_why(kind, dtype))
            for (kind, theirs), names in wishes.items()
        )
        why = f"{bits}-bit output of {maker.op}" if maker else "input of the graph"
        self.done[value.name] = ValuePlan(name=value.name, dtype=dtype, ranges=ranges, why=why, conversions=conversions)

    def _own(self, value: Value, maker: Node | None, dtype: IntType, bits: int) -> tuple[tuple[Range, ...], bool]:
        """A value's ranges, and whether nothing may change them."""
        grid = Grid(dtype, bits)
        if maker is not None and maker.op in _BOUNDED:
            return (_bounded(maker.op, grid),) * len(self._bins), True
        if maker is None or maker.op not in _MOVES or maker.inputs[0].name not in self.done:
            return self._observed(value, grid), False
        source = self.done[maker.inputs[0].name]
        return source.ranges if source.dtype == dtype else self._observed(maker.inputs[0], grid), True

    def _wish(self, node: Node, value: Value, own: IntType) -> tuple[IntType, tuple[Range, ...]] | None:
        """Type and ranges that a reader takes; None: the value's own."""
        bits = self.bits(node)
        dtype = self._spec.activation_dtype[bits]
        if self._linear(node) and not (dtype == own and bits == 16):
            return dtype, self._layers[module_path(node)].activation
        if node.op == "MatMul" and bits == 16 and node.inputs[1] is value and node.inputs[0] is not value:
            return "int16", tuple(_symmetric(*ends) for ends in self._ends(value))
        return None if dtype == own else (dtype, self._observed(value, Grid(dtype, bits)))

    def _linear(self, node: Node) -> bool:
        return node.op == "MatMul" and module_path(node) in self._layers and is_constant(node.inputs[1])

    def _observed(self, value: Value, grid: Grid) -> tuple[Range, ...]:
        return tuple(_range(*ends, grid) for ends in self._ends(value))

    def _ends(self, value: Value) -> list[tuple[float, float, int]]:
        """(minimum, maximum, slots that were seen) in each bin."""
        seen = [[self._extremes[value.name][slot] for slot in slots] for slots in self._bins]
        return [(min(low for low, _ in mine), max(high for _, high in mine), len(mine)) for mine in seen]


def module_path(node: Node) -> str:
    return str(node.name.rsplit("/", 1)[0])


def ruled(graph: Graph, spec: TargetSpec) -> list[str]:
    """Names that the patterns of a recipe are about: linears, and modules of any operator where all are quantized."""
    others = [module_path(node) for node in graph.nodes] if spec.every_operator else []
    return [*(linear.name for linear in graph.linears()), *others]


def _range(low: float, high: float, slots: int, grid: Grid) -> Range:
    scale, zero = affine(low, high, grid)
    return Range(lo=min(low, 0.0), hi=max(high, 0.0), scale=scale, zero_point=zero, why=f"min and max, {slots} slots")


def _bounded(op: str, grid: Grid) -> Range:
    low, high = _BOUNDED[op]
    scale = (high - low) / 2**grid.bits
    zero = grid.qmin + round(-low / scale)
    return Range(lo=low, hi=high - scale, scale=scale, zero_point=zero, why=f"all that {op} puts out")


def _symmetric(low: float, high: float, slots: int) -> Range:
    most = max(abs(low), abs(high))
    scale = float(np.float32(most / INT_RANGE["int16"][1])) or 1.0
    return Range(lo=-most, hi=most, scale=scale, zero_point=0, why=f"largest magnitude, {slots} slots")


def _same(left: Sequence[Range], right: Sequence[Range]) -> bool:
    return all(
        max(abs(a.lo - b.lo), abs(a.hi - b.hi)) <= SAME * max(b.hi - b.lo, 1e-30)
        for a, b in zip(left, right, strict=True)
    )


def _conversion_why(kind: IntType, own: IntType) -> str:
    if kind == "int16":
        return "second operand of a product: symmetric, for the HTP rounds an asymmetric one to 8 bits"
    return f"{kind} readers of a {own} value" if kind != own else "the range that was searched for a linear"
