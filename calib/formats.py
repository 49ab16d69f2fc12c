"""What a recipe's bits are on a target, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from vdq_export.calib.ranges import Grid
from vdq_export.errors import RecipeError
from vdq_export.graph import Linear
from vdq_export.plan import E4M3_MAX, MX_BLOCK, NVFP4_BLOCK, WIDEST, ScaleType, WeightType
from vdq_export.plan import Grid as NumberGrid
from vdq_export.recipe import Recipe
from vdq_export.target_spec import TargetSpec
from vdq_export.weights.number_grid import E2M1_QMAX


class WeightFormat(NamedTuple):
    """Container and grid of one weight: |q| <= qmax in `dtype`; group: input channels a scale, 0 for all of them.

    grid, scales, unit: as in plan.WeightPlan; unit 0 where it is not known yet. span: as TargetSpec.scale_span.
    """

    dtype: WeightType
    bits: int
    qmax: int
    group: int = 0
    grid: NumberGrid = "int"
    scales: ScaleType = "float"
    unit: float = 0.0
    span: float = 0.0


# Recipe's name -> weights in that format.
FLOATING: dict[str, WeightFormat] = {
    "mxfp4": WeightFormat("int8", 4, E2M1_QMAX, MX_BLOCK, "e2m1", "e8m0"),
    "nvfp4": WeightFormat("int8", 4, E2M1_QMAX, NVFP4_BLOCK, "e2m1", "e4m3"),
    "mxfp8": WeightFormat("float8e4m3fn", 8, E4M3_MAX, MX_BLOCK, "e4m3", "e8m0"),
    "fp8": WeightFormat("float8e4m3fn", 8, E4M3_MAX, 0, "e4m3"),
}
# Layers that left the bins' graphs: the host runs them, whatever the target, with weights that are read as integers.
HOISTED_WEIGHT = WeightFormat("int8", 8, 127)
_BLOCK_SCALED = ("mxfp4", "mxfp8", "nvfp4")  # formats whose activation scales are computed at run time


@dataclass(frozen=True)
class LayerFormat:
    """Formats of one linear; `why` says why they are not the recipe's. rank: of its branch, -1: the recipe's."""

    activation: Grid
    weight: WeightFormat
    why: str = ""
    rank: int = -1


class Allocated(NamedTuple):
    """Bits that an allocation chose for one layer; group and rank: -1 leaves the recipe's."""

    weights: int
    activations: int
    why: str
    group: int = -1
    rank: int = -1


def check(recipe: Recipe, spec: TargetSpec) -> LayerFormat:
    """The formats of layers without a rule of their own.

    Raises RecipeError naming what the target can do when it lacks what the recipe asks for.
    """
    weights, activations = recipe.weights, recipe.activations
    for grid, what in ((weights.grid, "weights"), (activations.grid, "activations")):
        if grid in spec.refused:
            raise RecipeError(f"recipe {recipe.name} asks for {grid.upper()} {what}: {spec.refused[grid]}")
    block_scaled = activations.grid in _BLOCK_SCALED
    if (block_scaled or activations.granularity != "tensor") and not spec.dynamic:
        what = f"{activations.grid.upper()} activations" if block_scaled else f"scales per {activations.granularity}"
        raise RecipeError(
            f"recipe {recipe.name} asks for {what}, computed at run time, which {spec.name} cannot",
            hint="use a static recipe, or --target reference to measure it",
        )
    for kind in recipe.attention.kinds:
        if kind not in spec.attention:
            raise RecipeError(
                f"recipe {recipe.name} asks for {kind} of attentions, which {spec.name} has no kernel for",
                hint=f"it offers: {', '.join(spec.attention) or 'float attention'}; --target reference measures it",
            )
    for grid, wanted, what in (
        (weights.grid, weights.bits, "weights"),
        (activations.grid, activations.bits, "activations"),
    ):
        if grid not in ("float", *spec.grids):
            raise RecipeError(f"recipe {recipe.name} asks for {grid.upper()} {what}, which {spec.name} lacks")
        if grid in FLOATING and FLOATING[grid].bits != wanted:
            raise RecipeError(
                f"recipe {recipe.name}: {grid.upper()} {what} have {FLOATING[grid].bits} bits, not {wanted}",
                hint=f"set {what}.bits = {FLOATING[grid].bits}",
            )
    if activations.grid == "float" and (recipe.smoothing.kind, recipe.rotation.kind) != ("none", "none"):
        raise RecipeError(f"recipe {recipe.name}: float activations need no smoothing or rotation")
    if weights.grid == "int" and weights.group and weights.group not in spec.groups:
        raise _unsupported(recipe, spec, f"weight groups of {weights.group}", spec.groups)
    if spec.every_operator and (some := [rule for rule in recipe.keep_float if rule.bins]):
        raise RecipeError(
            f"recipe {recipe.name} keeps {some[0].match} in float in some bins; {spec.name} leaves nothing in float",
            hint=f"override its bits instead: activations = {max(spec.activation_dtype)}",
        )
    for rule in recipe.override:
        if rule.group > 0 and rule.group not in spec.groups:
            raise _unsupported(recipe, spec, f"weight groups of {rule.group} for {rule.match}", spec.groups)
        for bits, offered, what in (
            (rule.weights, spec.weight_dtype, "weights"),
            (rule.activations, spec.activation_dtype, "activations"),
        ):
            if bits and bits not in offered:
                raise _unsupported(recipe, spec, f"{bits}-bit {what} for {rule.match}", sorted(offered))
    return LayerFormat(activation_grid(recipe, spec, activations.bits), _weight_format(recipe, spec, weights.bits))


def activation_grid(recipe: Recipe, spec: TargetSpec, bits: int) -> Grid:
    """Raises RecipeError when the target has no activations of so many bits."""
    if recipe.activations.grid == "float":
        return Grid("float", bits)
    if recipe.activations.grid in ("fp8", "mxfp8", "nvfp4"):
        return Grid("float8e4m3fn", bits, symmetric=True)  # E2M1 numbers are E4M3 numbers too
    if bits not in spec.activation_dtype:
        raise _unsupported(recipe, spec, f"{bits}-bit activations", sorted(spec.activation_dtype))
    return Grid(spec.activation_dtype[bits], bits, spec.symmetric_activations)


def assign(
    groups: Mapping[str, Sequence[Linear]], recipe: Recipe, spec: TargetSpec, allocated: Mapping[str, Allocated]
) -> dict[str, LayerFormat]:
    """Formats of every linear of `groups`: what was allocated to it, else its override's bits, else the recipe's.

    The linears of a group read one value and share its quantizer: the most activation bits any of them asks for.
    """
    formats = {}
    for members in groups.values():
        wishes = [_finest(x.name, recipe, spec) or allocated.get(x.name) or asked(x.name, recipe) for x in members]
        activations = max(wish.activations for wish in wishes)
        for linear, wish in zip(members, wishes, strict=True):
            formats[linear.name] = _format(linear, wish, activations, recipe, spec)
    return formats


def hoisted() -> LayerFormat:
    """The formats of a layer that is in no bin's graph: no bin has a range for it, and the host needs none."""
    return LayerFormat(Grid("float", WIDEST), HOISTED_WEIGHT, "hoisted: 8-bit weight, float activations", rank=0)


def _finest(layer: str, recipe: Recipe, spec: TargetSpec) -> Allocated | None:
    """The most bits there are, for a layer that the recipe keeps in float on a target that keeps none."""
    rule = next((keep for keep in recipe.kept_everywhere if fnmatchcase(layer, keep.match)), None)
    if rule is None or not spec.every_operator:
        return None
    why = f"most bits of {spec.name}, which has no float: {rule.why} (recipe: {rule.match})"
    return Allocated(max(spec.weight_dtype), max(spec.activation_dtype), why)


def _format(linear: Linear, wish: Allocated, activations: int, recipe: Recipe, spec: TargetSpec) -> LayerFormat:
    weight, why = _weight_format(recipe, spec, wish.weights), [wish.why] if wish.why else []
    if wish.group >= 0 and weight.grid == "int":
        weight = weight._replace(group=wish.group)
    _check_pair(linear.name, weight, recipe, activations, spec)
    if weight.group and linear.shape[0] % weight.group:
        reason = f"{linear.shape[0]} channels do not divide into groups of {weight.group}"
        if weight.grid != "int" or weight.bits in spec.group_only:
            raise RecipeError(f"{linear.name}: {reason}", hint="keep it in float, or use another format")
        weight = weight._replace(group=0)
        why.append(reason)
    if activations != wish.activations:
        why.append(f"{activations}-bit input for a layer beside it")
    return LayerFormat(activation_grid(recipe, spec, activations), weight, "; ".join(why), wish.rank)


def _check_pair(layer: str, weight: WeightFormat, recipe: Recipe, activations: int, spec: TargetSpec) -> None:
    """Raise RecipeError where the target has no product of the two formats, or no such weight without groups."""
    names = [name for name, fmt in FLOATING.items() if fmt == weight]
    read = f"int{activations}" if recipe.activations.grid == "int" else recipe.activations.grid
    pair = (names[0] if names else f"int{weight.bits}", read)
    if spec.pairs and pair not in spec.pairs:
        known = ", ".join(f"{w} x {a}" for w, a in spec.pairs)
        raise RecipeError(
            f"{layer}: {pair[0]} weights and {pair[1]} activations, which {spec.name} lacks", hint=f"it offers: {known}"
        )
    if weight.bits in spec.group_only and not weight.group:
        raise RecipeError(
            f"{layer}: {weight.bits}-bit weights with one scale a channel, which {spec.name} lacks",
            hint=f"it offers groups of {', '.join(str(group) for group in spec.groups)}",
        )


def asked(layer: str, recipe: Recipe) -> Allocated:
    """What the recipe itself asks for; of its overrides that match the last one to name a number wins."""
    wish = Allocated(recipe.weights.bits, recipe.activations.bits, "")
    for rule in recipe.override:
        if fnmatchcase(layer, rule.match):
            wish = Allocated(
                weights=rule.weights or wish.weights,
                activations=rule.activations or wish.activations,
                why=f"{rule.why} (recipe: {rule.match})",
                group=rule.group if rule.group >= 0 else wish.group,
                rank=rule.rank if rule.rank >= 0 else wish.rank,
            )
    return wish


def _weight_format(recipe: Recipe, spec: TargetSpec, bits: int) -> WeightFormat:
    floating = FLOATING.get(recipe.weights.grid)
    if floating is not None and floating.bits == bits:
        return floating
    if bits not in spec.weight_dtype or bits not in spec.weight_qmax:
        raise _unsupported(
            recipe, spec, f"{bits}-bit weights", sorted(spec.weight_dtype.keys() & spec.weight_qmax.keys())
        )
    group = recipe.weights.group if bits == recipe.weights.bits else 0  # groups are what few bits need
    return WeightFormat(spec.weight_dtype[bits], bits, spec.weight_qmax[bits], group, span=spec.scale_span)


def _unsupported(recipe: Recipe, spec: TargetSpec, wish: str, offered: Sequence[int]) -> RecipeError:
    known = ", ".join(str(b) for b in offered) or "none"
    return RecipeError(f"recipe {recipe.name} asks for {wish}, which {spec.name} lacks", hint=f"it offers: {known}")
