"""The first half of a plan: what happens to values before they are quantized, and when which bin holds.

What a smoothing or a rotation does to a weight is done by the float passes, so the second half (`solve`) reads weights
from the graph those passes left. A draft has everything but numbers of quantizers.

With smoothing `tsq` each bin gets weights of its own: one draft a bin. Else one draft holds all bins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal

import numpy as np
from msgspec.structs import replace

from vdq_export.calib import bins as binning
from vdq_export.calib import rotation, smoothing
from vdq_export.calib.formats import LayerFormat, check
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.transform import Transform
from vdq_export.errors import CalibrationError, RecipeError
from vdq_export.graph import Graph, Linear
from vdq_export.graphs.last import last_layers
from vdq_export.plan import Bin, HoistedPart, LayerPlan, QuantPlan, Rotation
from vdq_export.recipe import LAST, Keep, Recipe
from vdq_export.target_spec import TargetSpec
from vdq_export.weights.promise import Values


@dataclass(frozen=True)
class Network:
    """What drafts are made from: one canonical float graph, its record, and how it shall be quantized.

    expert: its name where the model has several. limits: the timesteps it serves, where others serve the next ones.
    hoisted: layers that are in no bin's graph, and where they are.
    """

    graph: Graph
    record: CalibrationRecord
    recipe: Recipe
    spec: TargetSpec
    expert: str = ""
    limits: tuple[float | None, float | None] = (None, None)
    hoisted: Mapping[str, HoistedPart] = field(default_factory=dict)


def draft(network: Network, *, tsw: binning.Tsw = 1, optimal_bins: bool = False, first: int = 0) -> list[QuantPlan]:
    """One draft for each set of weights. tsw: number of timestep bins, "auto" or "all"; optimal_bins: edges by dynamic
    programming instead of even ranges; first: number of the first bin.

    Raises RecipeError when recipe and target (or tsw and record) contradict each other, CalibrationError when the
    record is of another graph, lacks a value, or has no data where the recipe needs some.
    """
    network = dataclasses.replace(network, recipe=with_names(network.recipe, network.graph))
    graph, record, recipe, spec = network.graph, network.record, network.recipe, network.spec
    graph_hash = graph.hash()
    record.check(graph_hash)
    base = check(recipe, spec)
    linears = graph.linears()
    hoisted = network.hoisted
    kept = {x.name: why for x in linears if (why := keep_reason(x, recipe, spec, hoisted=x.name in hoisted))}
    quantized = [x for x in linears if x.name not in kept and x.name not in hoisted]
    groups = by_value(quantized, {x.name: x.value.name for x in quantized})

    def bins_for(transforms: Mapping[str, Transform]) -> tuple[tuple[Bin, ...], str]:
        watched = [binning.Watched(record.value(name), base.activation, transforms[name]) for name in groups]
        chosen, why = binning.choose(
            record, watched, tsw, optimal=optimal_bins, per_branch=recipe.activations.per_branch
        )
        return binning.place(chosen, network.expert, network.limits, first), why

    def plan(bins: Sequence[Bin], why: str, transforms: Mapping[str, Transform]) -> QuantPlan:
        return QuantPlan(
            model=record.model,
            graph_hash=graph_hash,
            target=spec.name,
            recipe=recipe,
            bins=tuple(bins),
            layers=tuple(
                _layer(x, kept.get(x.name, ""), hoisted.get(x.name, ""), transforms.get(x.value.name)) for x in linears
            ),
            bins_why=why,
            expert=network.expert,
            draft=True,
        )

    if not record.has_data:
        check_without_data(recipe, spec, tsw)
        bins, why = binning.whole(record)
        return [plan(binning.place(bins, network.expert, network.limits, first), why, _unseen(network, groups))]
    if recipe.smoothing.kind == "tsq" and not recipe.smoothing.shared:
        bins, why = bins_for(dict.fromkeys(groups, Transform()))
        slots = [binning.bin_slots(one, record.slots) for one in bins]
        every = [transforms_of(network, groups, linears, kept, base, [mine]) for mine in slots]
        return [plan([one], f"{why}; own weights a bin", mine) for one, mine in zip(bins, every, strict=True)]
    transforms = transforms_of(network, groups, linears, kept, base, _provisional(network, tsw))
    return [plan(*bins_for(transforms), transforms)]


def with_names(recipe: Recipe, graph: Graph) -> Recipe:
    """`recipe` with rules that keep "<last>" in float turned into rules for those layers of `graph` by name.

    Layers that a rule before has by its pattern are left to that one.
    """
    rules: list[Keep] = []
    for rule in recipe.keep_float:
        if rule.match != LAST:
            rules.append(rule)
            continue
        known = [one.match for one in rules if not one.bins]
        names = [name for name in last_layers(graph) if not any(fnmatchcase(name, one) for one in known)]
        rules += [replace(rule, match=escape(name)) for name in names]
    return replace(recipe, keep_float=tuple(rules))


def keep_reason(linear: Linear, recipe: Recipe, spec: TargetSpec, *, hoisted: bool = False) -> str:
    """Why a layer stays in float, or nothing. The first matching rule of the recipe is named.

    A target that leaves no operator in float gives those layers the most bits it has instead (formats.assign), unless
    they are hoisted and so not its own. Nor does its speed count then.
    """
    if spec.every_operator and not hoisted:
        return ""
    for rule in recipe.kept_everywhere:
        if fnmatchcase(linear.name, rule.match):
            return f"{rule.why} (recipe: {rule.match})"
    if linear.rows < spec.min_rows and not hoisted:
        return f"{linear.rows} row(s) a call, {spec.name} gains from {spec.min_rows} on"
    return ""


def check_without_data(recipe: Recipe, spec: TargetSpec, tsw: binning.Tsw) -> None:
    """Raise CalibrationError or RecipeError where `recipe`, `spec` or `tsw` need what only calibration knows."""
    if recipe.needs_data:
        raise CalibrationError(
            f"recipe {recipe.name} needs calibration data: {', '.join(recipe.data_uses)}",
            hint="calibrate, or take a recipe that needs none, such as w8a16",
        )
    if spec.every_operator:
        raise RecipeError(
            f"{spec.name} leaves no operator in float, so it needs static ranges of every value, which recipe "
            f"{recipe.name} has not",
            hint="use a static recipe, or another target",
        )
    if tsw != 1:
        raise RecipeError(
            f"--tsw {tsw}: recipe {recipe.name} has nothing that depends on the timestep, so there is one time range",
            hint="leave --tsw out",
        )


def _unseen(network: Network, groups: Mapping[str, Sequence[Linear]]) -> dict[str, Transform]:
    """{value: what becomes of it} where nothing is known of values: at most a rotation that is not searched for."""
    rotated = rotation.choose(network.graph, groups, network.recipe.rotation)
    return {name: Transform(None, turn, "the recipe smooths nothing", why) for name, (turn, why) in rotated.items()}


def by_value(linears: Sequence[Linear], values: Mapping[str, str]) -> dict[str, list[Linear]]:
    """{value: the linears that read it}, in graph order. values: what each reads in the untouched graph, since
    smoothing and rotation may have put nodes before them."""
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(values[linear.name], []).append(linear)
    return groups


def transforms_of(
    network: Network,
    groups: Mapping[str, Sequence[Linear]],
    linears: Sequence[Linear],
    kept: Mapping[str, str],
    base: LayerFormat,
    bins: Sequence[Sequence[int]],
) -> dict[str, Transform]:
    """{value: what becomes of it}, chosen on the slots of `bins`.

    A value that a layer kept in float, or hoisted, reads too is not smoothed: scaled, it would be wrong there.
    """
    record, recipe = network.record, network.recipe
    shared = {x.value.name: f"{x.name}, hoisted," for x in linears if x.name in network.hoisted}
    shared |= {x.value.name: f"{x.name}, kept in float," for x in linears if x.name in kept}
    free = [_group(record, name, members, base) for name, members in groups.items() if name not in shared]
    rotated = rotation.choose(network.graph, groups, recipe.rotation)
    turns = [rotated[g.value.name][0] for g in free]
    choices = smoothing.choose(free, recipe.smoothing, recipe.activations, recipe.weights.range, bins, turns)
    smoothed = dict(zip([g.value.name for g in free], choices, strict=True))
    found = {}
    for name, members in groups.items():
        choice = smoothed.get(name) or smoothing.Choice(None, f"{shared[name]} reads the same value")
        turn, why = rotated[name]
        transform = Transform(choice.smoothing, turn, choice.why, why)
        if turn is not None:
            group = _group(record, name, members, base)
            if recipe.rotation.scale == "channel":
                transform = _scaled(network, group, transform, turn, bins)
            if recipe.rotation.search:
                transform = _unless_worse(network, group, transform, bins)
        found[name] = transform
    return found


def _scaled(
    network: Network, group: smoothing.Group, transform: Transform, turn: Rotation, bins: Sequence[Sequence[int]]
) -> Transform:
    recipe = network.recipe
    scale, why = smoothing.after_rotation(group, transform, recipe.activations, recipe.weights.range, bins)
    if scale is None:
        return dataclasses.replace(transform, rotation_why=f"{transform.rotation_why}; {why}")
    turned = replace(turn, scale=tuple(np.asarray(scale).tolist()), why=f"{turn.why}; {why}")
    return dataclasses.replace(transform, rotation=turned, rotation_why=turned.why)


def _unless_worse(
    network: Network, group: smoothing.Group, rotated: Transform, bins: Sequence[Sequence[int]]
) -> Transform:
    """`rotated`, or the same without its rotation where that loses nothing.

    A rotation spreads the rounding noise of weights over all channels. Where a weight is small just because its channel
    is large, that noise meets the large channel; smoothing before the rotation evens them out.
    """
    recipe = network.recipe
    bare = dataclasses.replace(rotated, rotation=None)
    before, after = smoothing.output_errors(group, [bare, rotated], recipe.activations, recipe.weights.range, bins)
    numbers = f"output error {after:.2e} against {before:.2e} without"
    if after < before:
        return dataclasses.replace(rotated, rotation_why=f"{rotated.rotation_why}; {numbers}")
    return dataclasses.replace(bare, rotation_why=f"not rotated: {numbers} ({rotated.rotation_why})")


def _provisional(network: Network, tsw: binning.Tsw) -> list[list[int]]:
    """Slots of the bins that a search of alpha assumes: even ones (one a step for `auto`), for bins come after it."""
    record = network.record
    bins, _ = binning.choose(
        record, (), "all" if tsw == "auto" else tsw, per_branch=network.recipe.activations.per_branch
    )
    return [binning.bin_slots(one, record.slots) for one in bins]


def _group(record: CalibrationRecord, name: str, members: Sequence[Linear], base: LayerFormat) -> smoothing.Group:
    return smoothing.Group(
        value=record.value(name),
        names=tuple(m.name for m in members),
        weights=Values(m.weight._values for m in members),
        grid=base.activation,
        format=base.weight,
    )


def _layer(linear: Linear, keep: str, hoisted: HoistedPart | Literal[""], transform: Transform | None) -> LayerPlan:
    if keep or hoisted or transform is None:
        return LayerPlan(
            name=linear.name,
            value=linear.value.name,
            rows=linear.rows,
            shape=linear.shape,
            keep_float=keep,
            hoisted=hoisted,
        )
    return LayerPlan(
        name=linear.name,
        value=linear.value.name,
        rows=linear.rows,
        shape=linear.shape,
        smoothing=transform.smoothing,
        rotation=transform.rotation,
        smoothing_why=transform.smoothing_why,
        rotation_why=transform.rotation_why,
    )
