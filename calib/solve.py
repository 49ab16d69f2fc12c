"""Recipe + target table + record → QuantPlan. Pure and deterministic; weights are read in blocks, never copied whole.

The order matters: smoothing changes distributions, so bins and ranges are computed on what it leaves, and weight
scales on s · W. Layers that read one value form a group and share smoothing and ranges: one quantizer serves them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vdq_export.calib import bins as binning
from vdq_export.calib import smoothing
from vdq_export.calib.ranges import Grid, activation_range, weight_scale
from vdq_export.calib.record import CalibrationRecord
from vdq_export.errors import RecipeError
from vdq_export.graph import Graph, Linear
from vdq_export.plan import Bin, IntType, LayerPlan, QuantPlan, Range, WeightPlan
from vdq_export.recipe import Recipe
from vdq_export.target_spec import TargetSpec

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Formats:
    """What the recipe's bits are on the target."""

    activation: Grid
    weight: IntType
    qmax: int


def solve(
    graph: Graph,
    record: CalibrationRecord,
    recipe: Recipe,
    spec: TargetSpec,
    *,
    tsw: binning.Tsw = 1,
    optimal_bins: bool = False,
    progress: Progress | None = None,
) -> QuantPlan:
    """Choose every number for the canonical float `graph`.

    tsw: number of timestep bins, "auto" or "all"; optimal_bins: edges by dynamic programming instead of even ranges.
    progress(done, total) counts layers. Raises RecipeError when recipe and target (or tsw and record) contradict each
    other, CalibrationError when the record is of another graph or lacks a value.
    """
    graph_hash = graph.hash()
    record.check(graph_hash)
    formats = resolve_formats(recipe, spec)
    linears = graph.linears()
    kept = {linear.name: why for linear in linears if (why := keep_reason(linear, recipe, spec))}
    grouped: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.name not in kept:
            grouped.setdefault(linear.value.name, []).append(linear)
    groups = [_group(record, members, formats) for members in grouped.values()]

    smooth = choose_smoothing(record, groups, linears, kept, recipe, tsw)
    watched = [binning.Watched(g.value, g.grid, smooth[g.value.name].scale) for g in groups]
    settings = recipe.activations
    bins, bins_why = binning.choose(record, watched, tsw, optimal=optimal_bins, per_branch=settings.per_branch)
    slots = [binning.bin_slots(b, record.slots) for b in bins]
    ranges = {
        g.value.name: tuple(activation_range(g.value, s, settings, g.grid, smooth[g.value.name].scale) for s in slots)
        for g in groups
    }

    layers = []
    for done, linear in enumerate(linears, 1):
        if linear.name in kept:
            layers.append(
                LayerPlan(
                    name=linear.name,
                    value=linear.value.name,
                    rows=linear.rows,
                    shape=linear.shape,
                    keep_float=kept[linear.name],
                )
            )
        else:
            name = linear.value.name
            layers.append(_layer(linear, recipe, formats, smooth[name], ranges[name]))
        if progress is not None:
            progress(done, len(linears))
    return _plan(record, graph_hash, recipe, spec, bins, layers, bins_why)


def resolve_formats(recipe: Recipe, spec: TargetSpec) -> Formats:
    """Raises RecipeError naming what the target can do when it lacks the recipe's bits."""
    a, w = recipe.activations.bits, recipe.weights.bits
    if a not in spec.activation_dtype:
        raise _unsupported(recipe, spec, f"{a}-bit activations", sorted(spec.activation_dtype))
    if w not in spec.weight_dtype or w not in spec.weight_qmax:
        raise _unsupported(recipe, spec, f"{w}-bit weights", sorted(spec.weight_dtype.keys() & spec.weight_qmax.keys()))
    return Formats(Grid(spec.activation_dtype[a], a), spec.weight_dtype[w], spec.weight_qmax[w])


def keep_reason(linear: Linear, recipe: Recipe, spec: TargetSpec) -> str:
    """Why a layer stays in float, or nothing. The first matching rule of the recipe is named."""
    for rule in recipe.keep_float:
        if fnmatchcase(linear.name, rule.match):
            return f"{rule.why} (recipe: {rule.match})"
    if linear.rows < spec.min_rows:
        return f"{linear.rows} row(s) a call, {spec.name} gains from {spec.min_rows} on"
    return ""


def choose_smoothing(
    record: CalibrationRecord,
    groups: Sequence[smoothing.Group],
    linears: Sequence[Linear],
    kept: dict[str, str],
    recipe: Recipe,
    tsw: binning.Tsw,
) -> dict[str, smoothing.Choice]:
    """{value: choice}. A value that a layer kept in float reads too stays as it is: scaled, it would be wrong there.

    A search of alpha needs ranges before bins are chosen: it takes even ones (one a step for `auto`).
    """
    shared = {x.value.name: x.name for x in linears if x.name in kept}
    free = [g for g in groups if g.value.name not in shared]
    provisional, _ = binning.choose(
        record, (), "all" if tsw == "auto" else tsw, per_branch=recipe.activations.per_branch
    )
    slots = [binning.bin_slots(b, record.slots) for b in provisional]
    choices = smoothing.choose(free, recipe.smoothing, recipe.activations, recipe.weights.range, slots)
    found = {g.value.name: c for g, c in zip(free, choices, strict=True)}
    for group in groups:
        name = group.value.name
        if name in shared:
            found[name] = smoothing.Choice(None, f"{shared[name]}, kept in float, reads the same value")
    return found


def _unsupported(recipe: Recipe, spec: TargetSpec, wish: str, offered: Sequence[int]) -> RecipeError:
    known = ", ".join(str(b) for b in offered) or "none"
    return RecipeError(
        f"recipe {recipe.name} asks for {wish}, which {spec.name} lacks", hint=f"bits it offers: {known}"
    )


def _group(record: CalibrationRecord, members: Sequence[Linear], formats: Formats) -> smoothing.Group:
    return smoothing.Group(
        value=record.value(members[0].value.name),
        names=tuple(m.name for m in members),
        weights=tuple(m.weight.values for m in members),
        grid=formats.activation,
        qmax=formats.qmax,
    )


def _layer(
    linear: Linear, recipe: Recipe, formats: Formats, choice: smoothing.Choice, ranges: tuple[Range, ...]
) -> LayerPlan:
    scale = weight_scale(linear.weight.values, formats.qmax, choice.scale, recipe.weights.range)
    why = "least squared error a channel" if recipe.weights.range == "mse" else "largest magnitude a channel"
    return LayerPlan(
        name=linear.name,
        value=linear.value.name,
        rows=linear.rows,
        shape=linear.shape,
        smoothing=choice.smoothing,
        smoothing_why=choice.why,
        weight=WeightPlan(dtype=formats.weight, qmax=formats.qmax, scale=tuple(scale.tolist()), why=why),
        activation_dtype=formats.activation.dtype,
        activation=ranges,
    )


def _plan(
    record: CalibrationRecord,
    graph_hash: str,
    recipe: Recipe,
    spec: TargetSpec,
    bins: tuple[Bin, ...],
    layers: Sequence[LayerPlan],
    bins_why: str,
) -> QuantPlan:
    return QuantPlan(
        model=record.model,
        graph_hash=graph_hash,
        target=spec.name,
        recipe=recipe,
        bins=bins,
        layers=tuple(layers),
        bins_why=bins_why,
    )
