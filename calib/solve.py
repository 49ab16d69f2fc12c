"""The second half of a plan: ranges of activations, grids, integers and low-rank branches of weights.

Weights are read from the graph that the float passes left: smoothed and rotated, producers that took a fold included.
Deterministic; the groups of layers that read one value are independent and solved in parallel processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from vdq_export.calib import allocate, low_rank
from vdq_export.calib.bins import bin_slots
from vdq_export.calib.draft import by_value
from vdq_export.calib.dynamic import online
from vdq_export.calib.formats import LayerFormat, activation_grid, assign, hoisted
from vdq_export.calib.group import GroupTask, LayerWeights, solve_groups
from vdq_export.calib.ranges import activation_range
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.transform import Transform
from vdq_export.graph import Array, Graph, Linear
from vdq_export.plan import Dynamic, LayerPlan, QuantPlan, Range, tensor_name
from vdq_export.target_spec import TargetSpec
from vdq_export.work.engine import Engine
from vdq_export.work.store import WorkStore

Progress = Callable[[int, int], None]
TOKENS = 4096  # sampled rows of one value that searches and Hessians see, over all bins


@dataclass(frozen=True)
class Solved:
    """A complete plan and its tensors."""

    plan: QuantPlan
    tensors: Mapping[str, Array]


def solve(
    draft: QuantPlan,
    graph: Graph,
    record: CalibrationRecord,
    spec: TargetSpec,
    *,
    engine: Engine | None = None,
    store: WorkStore | None = None,
    progress: Progress | None = None,
) -> Solved:
    """Complete `draft` with `graph`, the float graph after its float passes. progress(done, total) counts layers.

    engine: where groups of layers are solved. store: keeps the costly ones. Raises RecipeError for a budget that no
    choice of bits meets and for bits the target lacks.
    """
    recipe = draft.recipe
    kept = {layer.name: layer.keep_float for layer in draft.layers if not layer.quantized}
    values = {layer.name: layer.value for layer in draft.layers}
    linears = [x for x in graph.linears() if x.name not in kept]
    ahead = {layer.name for layer in draft.layers if layer.hoisted}
    grouped = by_value([x for x in linears if x.name not in ahead], values)
    formats = assign(grouped, recipe, spec, allocate.choose(draft, grouped, record, spec))
    formats |= {name: hoisted() for name in ahead}
    ranks = low_rank.choose_ranks([x for x in linears if x.name not in ahead], recipe.low_rank)
    groups = [*grouped.items(), *by_value([x for x in linears if x.name in ahead], values).items()]
    # Without a quantizer to share, a layer is a group of its own: all blocks read the prompt.
    groups = [
        (name, part)
        for name, members in groups
        for part in ([[x] for x in members] if formats[members[0].name].activation.dtype == "float" else [members])
    ]

    def task(group: tuple[str, list[Linear]]) -> GroupTask:
        return _task(draft, record, *group, formats, ranks)

    # Without data, making a task is reading its weights and solving it next to nothing.
    tasks = map(task, groups) if record.has_data else _made_ahead(task, groups)
    layers, tensors, done = {layer.name: layer for layer in draft.layers}, dict[str, Array](), 0
    for (_, members), result in zip(groups, solve_groups(tasks, engine, store), strict=True):
        for linear, weights in zip(members, result.layers, strict=True):
            layers[linear.name] = _complete(
                layers[linear.name], formats[linear.name], weights, result.ranges, result.dynamic
            )
            tensors |= {tensor_name(linear.name, what): array for what, array in weights.tensors.items()}
            done += 1
            if progress is not None:
                progress(done, len(linears))
    return Solved(replace(draft, layers=tuple(layers.values()), draft=False), tensors)


def _made_ahead(
    make: Callable[[tuple[str, list[Linear]]], GroupTask], groups: Sequence[tuple[str, list[Linear]]], threads: int = 2
) -> Iterator[GroupTask]:
    """make() of each group, in order, the next `threads` ones while the caller works on what it has."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[Future[GroupTask]]()
        for group in groups:
            waiting.append(pool.submit(make, group))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def at_precision(plan: QuantPlan, record: CalibrationRecord, spec: TargetSpec, bits: int, first: int) -> QuantPlan:
    """`plan` with the same weights and `bits`-bit activations, as the high precision of a delta schedule; bins from
    `first`."""
    settings = plan.recipe.activations
    grid = activation_grid(plan.recipe, spec, bits)
    slots = [bin_slots(one, record.slots) for one in plan.bins]
    layers = []
    for layer in plan.layers:
        if layer.activation and layer.activation_bits < bits:
            value, transform = record.value(layer.value), Transform.of(layer)
            ranges = tuple(activation_range(value, one, settings, grid, transform) for one in slots)
            layer = replace(layer, activation_dtype=grid.dtype, activation_bits=bits, activation=ranges)
        layers.append(layer)
    bins = tuple(replace(one, index=first + number) for number, one in enumerate(plan.bins))
    return replace(plan, layers=tuple(layers), bins=bins, precision="high")


def _task(
    draft: QuantPlan,
    record: CalibrationRecord,
    name: str,
    members: list[Linear],
    formats: Mapping[str, LayerFormat],
    ranks: Mapping[str, int],
) -> GroupTask:
    layer = next(x for x in draft.layers if x.name == members[0].name)
    value = record.value(name) if record.has_data else None
    transform, recipe = Transform.of(layer), draft.recipe
    slots = [bin_slots(one, record.slots) for one in draft.bins]
    grid = formats[members[0].name].activation
    ranges, dynamic = list[Range](), list[Dynamic]()
    for one in slots if grid.dtype != "float" else ():
        known = None if value is None else activation_range(value, one, recipe.activations, grid, transform)
        chosen = online(recipe.activations, known)
        ranges += [known] if chosen is None and known is not None else []
        dynamic += [] if chosen is None else [chosen]
    rows: tuple[Array, ...] = tuple(np.zeros((0, members[0].shape[0]), np.float32) for _ in slots)
    if value is not None and (recipe.activations.clip or recipe.weights.rounding == "gptq"):  # what looks at rows
        rows = tuple(transform(value.sample(one, most=max(1, TOKENS // len(slots)))) for one in slots)
    return GroupTask(
        names=tuple(m.name for m in members),
        rows=rows,
        ranges=tuple(ranges),
        dynamic=tuple(dynamic),
        grid=grid,
        weights=tuple(np.asarray(m.read_weight(), np.float32) for m in members),
        formats=tuple(formats[m.name].weight for m in members),
        ranks=tuple(ranks.get(m.name, 0) if formats[m.name].rank < 0 else formats[m.name].rank for m in members),
        recipe=recipe,
    )


def _complete(
    layer: LayerPlan,
    chosen: LayerFormat,
    weights: LayerWeights,
    ranges: tuple[Range, ...],
    dynamic: tuple[Dynamic, ...],
) -> LayerPlan:
    return replace(
        layer,
        weight=weights.weight,
        low_rank=weights.low_rank,
        activation_dtype=chosen.activation.dtype,
        activation_bits=chosen.activation.bits,
        activation=ranges,
        dynamic=dynamic,
        bits_why=chosen.why,
    )
