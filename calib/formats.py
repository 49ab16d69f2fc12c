"""What a recipe's bits are on a target, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from vdq_export.calib.dynamic import MX_BLOCK
from vdq_export.calib.ranges import Grid
from vdq_export.errors import RecipeError
from vdq_export.graph import Linear
from vdq_export.plan import Grid as NumberGrid
from vdq_export.plan import IntType
from vdq_export.recipe import Recipe
from vdq_export.target_spec import TargetSpec

MX_QMAX = 12  # twice the largest E2M1 number


class WeightFormat(NamedTuple):
    """Container and grid of one weight: |q| <= qmax in `dtype`; group: input channels a scale, 0 for all of them.

    grid "e2m1": q is twice a number of the MXFP4 element type (OCP Microscaling Formats 1.0), scales powers of two.
    """

    dtype: IntType
    bits: int
    qmax: int
    group: int = 0
    grid: NumberGrid = "int"


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
    online = activations.granularity != "tensor" or activations.grid == "mxfp4"
    if online and not spec.dynamic:
        what = (
            "MXFP4 activations" if activations.grid == "mxfp4" else f"activation scales per {activations.granularity}"
        )
        raise RecipeError(
            f"recipe {recipe.name} asks for {what}, computed at run time, which {spec.name} cannot",
            hint="use a static recipe, or --target reference to measure it",
        )
    if weights.grid == "mxfp4" and "e2m1" not in spec.grids:
        raise RecipeError(f"recipe {recipe.name} asks for MXFP4 weights, which {spec.name} lacks")
    if weights.grid == "int" and weights.group and weights.group not in spec.groups:
        raise _unsupported(recipe, spec, f"weight groups of {weights.group}", spec.groups)
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
    if bits not in spec.activation_dtype:
        raise _unsupported(recipe, spec, f"{bits}-bit activations", sorted(spec.activation_dtype))
    return Grid(spec.activation_dtype[bits], bits)


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


def _finest(layer: str, recipe: Recipe, spec: TargetSpec) -> Allocated | None:
    """The most bits there are, for a layer that the recipe keeps in float on a target that keeps none."""
    rule = next((keep for keep in recipe.keep_float if fnmatchcase(layer, keep.match)), None)
    if rule is None or not spec.every_operator:
        return None
    why = f"most bits of {spec.name}, which has no float: {rule.why} (recipe: {rule.match})"
    return Allocated(max(spec.weight_dtype), max(spec.activation_dtype), why)


def _format(linear: Linear, wish: Allocated, activations: int, recipe: Recipe, spec: TargetSpec) -> LayerFormat:
    weight, why = _weight_format(recipe, spec, wish.weights), [wish.why] if wish.why else []
    if wish.group >= 0 and weight.grid == "int":
        weight = weight._replace(group=wish.group)
    if weight.group and linear.shape[0] % weight.group:
        reason = f"{linear.shape[0]} channels do not divide into groups of {weight.group}"
        if weight.grid == "e2m1":
            raise RecipeError(f"{linear.name}: {reason}", hint="keep it in float, or use an integer grid")
        weight = weight._replace(group=0)
        why.append(reason)
    if activations != wish.activations:
        why.append(f"{activations}-bit input for a layer beside it")
    return LayerFormat(activation_grid(recipe, spec, activations), weight, "; ".join(why), wish.rank)


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
    if bits not in spec.weight_dtype or bits not in spec.weight_qmax:
        raise _unsupported(
            recipe, spec, f"{bits}-bit weights", sorted(spec.weight_dtype.keys() & spec.weight_qmax.keys())
        )
    if recipe.weights.grid == "mxfp4" and bits == 4:
        return WeightFormat("int8", 4, MX_QMAX, MX_BLOCK, "e2m1")
    group = recipe.weights.group if bits == recipe.weights.bits else 0  # groups are what few bits need
    return WeightFormat(spec.weight_dtype[bits], bits, spec.weight_qmax[bits], group)


def _unsupported(recipe: Recipe, spec: TargetSpec, wish: str, offered: Sequence[int]) -> RecipeError:
    known = ", ".join(str(b) for b in offered) or "none"
    return RecipeError(f"recipe {recipe.name} asks for {wish}, which {spec.name} lacks", hint=f"it offers: {known}")
