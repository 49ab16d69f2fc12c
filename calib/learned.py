"""Plans of checkpoints whose scales were learned in training: the integers are those that training saw, to the last.

Their weights are neither smoothed nor rotated nor split, which would take them off their grid (`adapted`); what `solve`
chose for them is replaced (`carry`). Layers without learned scales keep what it chose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec.structs import replace

from vdq_export.calib.solve import Solved
from vdq_export.errors import RecipeError
from vdq_export.graph import Array, Graph, Linear
from vdq_export.plan import LayerPlan, QuantPlan, Range, bounds, tensor_name
from vdq_export.recipe import LowRankRecipe, Recipe, RotationRecipe, SmoothingRecipe
from vdq_export.target_spec import TargetSpec
from vdq_export.weights.learned import Learned, LearnedLayer
from vdq_export.weights.number_grid import numpy_type


def adapted(recipe: Recipe, learned: Learned | None) -> Recipe:
    """`recipe` without what would move weights off the grid they were trained on; itself where nothing was learned."""
    if learned is None or recipe.weights.learned == "ignore":
        return recipe
    weights: Any = replace(recipe.weights, group=0, rounding="nearest", grid="int")
    return replace(
        recipe, weights=weights, smoothing=SmoothingRecipe(), rotation=RotationRecipe(), low_rank=LowRankRecipe()
    )


def carry(solved: Solved, graph: Graph, learned: Learned | None, spec: TargetSpec) -> Solved:
    """`solved` with the learned scales and integers. graph: the float graph the plan is for.

    Raises RecipeError where the learned integers do not fit the target's grid of the recipe's bits.
    """
    if learned is None or solved.plan.recipe.weights.learned == "ignore":
        return solved
    linears = {linear.name: linear for linear in graph.linears()}
    tensors, layers = dict(solved.tensors), list[LayerPlan]()
    inputs = _inputs(solved.plan, learned)
    for layer in solved.plan.layers:
        if layer.quantized and layer.weight is not None and layer.name in linears:
            layer = _with_weight(layer, linears[layer.name], learned, tensors, spec)
            layer = _with_input(layer, inputs.get(layer.value))
        layers.append(layer)
    return Solved(replace(solved.plan, layers=tuple(layers)), tensors)


def _with_weight(
    layer: LayerPlan, linear: Linear, learned: Learned, tensors: dict[str, Array], spec: TargetSpec
) -> LayerPlan:
    plan = layer.weight
    assert plan is not None
    if layer.name not in learned.layers:
        return layer
    weight = np.asarray(linear.read_weight(), np.float32)
    found = learned.in_order(layer.name, weight)
    if found is None:
        return replace(layer, weight=replace(plan, why=f"{plan.why}; learned scales unused: the weight was changed"))
    order, mine = found
    if len(mine.scale) not in (1, weight.shape[1]):
        raise RecipeError(f"{mine.origin} has {len(mine.scale)} scales for {weight.shape[1]} output channels")
    levels = 2 ** (plan.bits - 1) - 1
    scale, codes = mine.grid(weight, order, levels)
    _check(layer.name, mine, codes, plan.qmax, plan.bits, spec)
    tensors[tensor_name(layer.name, "codes")] = codes.astype(numpy_type("int8" if levels <= 127 else "int16"))
    why = f"learned in training ({mine.origin.removeprefix(layer.name + '.')})"
    qmax = max(plan.qmax, int(np.abs(codes).max(initial=0)))
    return replace(layer, weight=replace(plan, scale=tuple(scale.tolist()), codes=True, qmax=qmax, why=why))


def _check(name: str, mine: LearnedLayer, codes: Array, qmax: int, bits: int, spec: TargetSpec) -> None:
    """The integers are the target's: |q| up to qmax, and one more below where a two's complement has it."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    if -qmax - 1 <= low and high <= qmax:
        return
    raise RecipeError(
        f"{name}: learned integers ({mine.origin}) run from {low} to {high}, {bits} bits on {spec.name} ({spec.isa}) "
        f"end at ±{qmax}",
        hint="say the bits it was trained for (weights.bits), choose another --isa or --target, or set "
        'weights.learned = "ignore"',
    )


def _inputs(plan: QuantPlan, learned: Learned) -> Mapping[str, tuple[float, int] | None]:
    """{value: learned (scale, signed zero point)} of values whose quantized readers all learned the same one."""
    found: dict[str, set[tuple[float, int] | None]] = {}
    for layer in plan.layers:
        if layer.quantized:
            mine = learned.layers.get(layer.name)
            found.setdefault(layer.value, set()).add(None if mine is None else mine.input_parameters())
    return {value: next(iter(given)) for value, given in found.items() if len(given) == 1}


def _with_input(layer: LayerPlan, given: tuple[float, int] | None) -> LayerPlan:
    """The same range in every bin: training knew one."""
    if given is None or not layer.activation or layer.activation_bits != 8:
        return layer
    scale, signed = given
    low, high = bounds(layer.activation_dtype, 8)
    zero = signed + 128 + low
    if not low <= zero <= high or (layer.activation_dtype == "int8" and signed):
        return layer
    one = Range(
        lo=scale * (low - zero), hi=scale * (high - zero), scale=scale, zero_point=zero, why="learned in training"
    )
    return replace(layer, activation=(one,) * len(layer.activation))
