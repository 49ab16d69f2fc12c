"""Ranges of every value, for targets that leave no operator in float.

Legend: S slots. Which values there are is known only behind the float passes (a smoothing or a rotation moves ranges
and adds values), so the graph they left runs over the trajectories once more. It computes each value's minimum and
maximum itself: the call returns two numbers a value, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from msgspec.structs import replace

from vdq_export import ort
from vdq_export.calib.bins import bin_slots
from vdq_export.calib.constants import plan_constants
from vdq_export.calib.observe import iter_steps, step_feeds
from vdq_export.calib.ranges import Grid, affine
from vdq_export.calib.record import Slot, denoising_order, not_finite
from vdq_export.errors import CalibrationError
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.model import Model
from vdq_export.plan import INT_RANGE, Conversion, IntType, LayerPlan, QuantPlan, Range, ValuePlan
from vdq_export.target_spec import TargetSpec

Progress = Callable[[int, int | None], None]
# Functions of bounded output -> (lowest, highest) of all grids: runtimes fix these quantizers whatever a graph says.
_BOUNDED = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}
SAME = 1e-3  # two ranges are one when their ends differ by less than this share of the range


@dataclass
class Extremes:
    """{value: {slot: (minimum, maximum)}} over `calls` calls of one graph."""

    values: dict[str, dict[Slot, tuple[float, float]]]
    slots: tuple[Slot, ...]
    calls: int


def observe_values(
    graph: Graph, model: Model, *, progress: Progress | None = None, threads: int | None = None
) -> Extremes:
    """Run every step of the model's trajectories through the float `graph`.

    Raises CalibrationError for NaN or Inf (value and timestep named) and for a model without trajectories.
    """
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
    return Extremes(seen, slots, calls)


def float_values(graph: Graph) -> list[Value]:
    """Every float value that a graph input or a node gives, in graph order."""
    made = [value for node in graph.nodes for value in node.outputs if value.name]
    found = [value for value in [*graph.gs.inputs, *made] if value.dtype == np.float32]
    unknown = next((v.name for v in made if v.dtype is None or v.shape is None), None)
    if unknown is not None:
        raise CalibrationError(f"type and shape of {unknown} are not known", hint="shape inference gave none")
    return found


def plan_values(plan: QuantPlan, graph: Graph, extremes: Extremes, spec: TargetSpec) -> QuantPlan:
    """`plan` with the types and ranges of every value and constant of `graph`, the graph that was observed.

    A value gets the bits of the operator that makes it. Readers of other bits, linears whose input range was searched
    narrower, and products of two computed operands (the second one: symmetric, when in 16 bits) get a conversion.
    """
    layers = {layer.name: layer for layer in plan.layers}
    slots = [bin_slots(one, extremes.slots) for one in plan.bins]
    widths = _Widths(plan, spec)
    values = []
    for value in float_values(graph):
        ranges = [[extremes.values[value.name][extremes.slots[i]] for i in mine] for mine in slots]
        values.append(_plan_value(value, ranges, widths, layers, spec))
    constants = plan_constants(graph, lambda node: spec.activation_dtype[widths(node)])
    return replace(plan, values=tuple(values), constants=tuple(constants))


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


class _Widths:
    """Bits of the activations that a node reads and makes."""

    def __init__(self, plan: QuantPlan, spec: TargetSpec) -> None:
        self._recipe, self._most = plan.recipe, max(spec.activation_dtype)
        self._layers = {layer.name: layer.activation_bits for layer in plan.layers if layer.quantized}

    def __call__(self, node: Node) -> int:
        path = module_path(node)
        if path in self._layers:
            return self._layers[path]
        if any(fnmatchcase(path, rule.match) for rule in self._recipe.keep_float):
            return self._most
        bits = self._recipe.activations.bits
        for rule in self._recipe.override:
            if rule.activations and fnmatchcase(path, rule.match):
                bits = rule.activations
        return bits


def module_path(node: Node) -> str:
    return str(node.name.rsplit("/", 1)[0])


def _plan_value(
    value: Value,
    extremes: Sequence[Sequence[tuple[float, float]]],
    widths: _Widths,
    layers: Mapping[str, LayerPlan],
    spec: TargetSpec,
) -> ValuePlan:
    readers = list({id(node): node for node in value.outputs}.values())
    own = widths(value.inputs[0]) if value.inputs else max((widths(n) for n in readers), default=8)
    dtype = spec.activation_dtype[own]
    bounds = [(min(low for low, _ in mine), max(high for _, high in mine)) for mine in extremes]
    counts = [len(mine) for mine in extremes]
    ranges = tuple(_range(*ends, Grid(dtype, own), n) for ends, n in zip(bounds, counts, strict=True))
    bounded = bool(value.inputs) and value.inputs[0].op in _BOUNDED
    if bounded:
        ranges = (_bounded(value.inputs[0].op, Grid(dtype, own)),) * len(bounds)
    found: dict[tuple[IntType, tuple[Range, ...]], list[str]] = {}
    for node in readers:
        wanted = _wanted(node, value, dtype, bounds, counts, widths, layers, spec)
        if wanted is not None and not (wanted[0] == dtype and _same(wanted[1], ranges)):
            found.setdefault(wanted, []).append(node.name)
    alone = len(found) == 1 and next(iter(found))[0] == dtype and sum(map(len, found.values())) == len(readers)
    if alone and not bounded:
        ((_, ranges),) = found  # nobody else reads it: the range that was searched is its own
        found = {}
    conversions = tuple(
        Conversion(dtype=kind, ranges=theirs, readers=tuple(names), why=_conversion_why(kind, dtype))
        for (kind, theirs), names in found.items()
    )
    why = f"{own}-bit output of {value.inputs[0].op}" if value.inputs else "input of the graph"
    return ValuePlan(name=value.name, dtype=dtype, ranges=ranges, why=why, conversions=conversions)


def _wanted(
    node: Node,
    value: Value,
    own: IntType,
    bounds: Sequence[tuple[float, float]],
    counts: Sequence[int],
    widths: _Widths,
    layers: Mapping[str, LayerPlan],
    spec: TargetSpec,
) -> tuple[IntType, tuple[Range, ...]] | None:
    """Type and ranges that a reader takes; None: like the value's own."""
    bits = widths(node)
    dtype = spec.activation_dtype[bits]
    layer = layers.get(module_path(node))
    if node.op == "MatMul" and layer is not None and layer.activation and is_constant_weight(node):
        return layer.activation_dtype, layer.activation  # type: ignore[return-value]  # integers on such targets
    if node.op == "MatMul" and bits == 16 and node.inputs[1] is value and node.inputs[0] is not value:
        return "int16", tuple(_symmetric(*ends, n) for ends, n in zip(bounds, counts, strict=True))
    if dtype == own:
        return None
    return dtype, tuple(_range(*ends, Grid(dtype, bits), n) for ends, n in zip(bounds, counts, strict=True))


def is_constant_weight(node: Node) -> bool:
    return is_constant(node.inputs[1]) and len(node.inputs[1].shape) == 2


def _range(low: float, high: float, grid: Grid, calls: int) -> Range:
    scale, zero = affine(low, high, grid)
    return Range(lo=min(low, 0.0), hi=max(high, 0.0), scale=scale, zero_point=zero, why=f"min and max, {calls} slots")


def _bounded(op: str, grid: Grid) -> Range:
    low, high = _BOUNDED[op]
    scale = (high - low) / 2**grid.bits
    zero = grid.qmin + round(-low / scale)
    return Range(lo=low, hi=high - scale, scale=scale, zero_point=zero, why=f"all that {op} puts out")


def _symmetric(low: float, high: float, calls: int) -> Range:
    most = max(abs(low), abs(high))
    scale = float(np.float32(most / INT_RANGE["int16"][1])) or 1.0
    return Range(lo=-most, hi=most, scale=scale, zero_point=0, why=f"largest magnitude, {calls} slots")


def _same(left: Sequence[Range], right: Sequence[Range]) -> bool:
    return all(
        max(abs(a.lo - b.lo), abs(a.hi - b.hi)) <= SAME * max(b.hi - b.lo, 1e-30)
        for a, b in zip(left, right, strict=True)
    )


def _conversion_why(kind: IntType, own: IntType) -> str:
    if kind == "int16":
        return "second operand of a product: symmetric, for the HTP rounds an asymmetric one to 8 bits"
    return f"{kind} readers of a {own} value" if kind != own else "the range that was searched for a linear"
