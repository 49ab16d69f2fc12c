"""Bits per layer under a budget, solved exactly: the least summed error, not a rule of thumb.

    minimise   Σ_layers error[layer, its candidate]
    subject to Σ_layers cost[layer, its candidate] ≤ budget · Σ_layers weights (size) or multiply-adds (bops)
               layers that read one value take candidates of the same activation bits (one quantizer serves them)
               at most `high_blocks` blocks hold a candidate above the lowest bits

error: the mean relative output error of sensitivity.py, every layer counting alike. It orders allocations well, not
perfectly. (Tried: weights from the Jacobian of the network's output. On the sample they were no better: clips of equal
size 1.9 dB worse and 0.2 dB better. Giving the last blocks the bits was 0.6 and 0.8 dB better than either sum.)

cost, size: bits a layer stores. Integers at their nominal bits (a 6-bit weight counts 6 in whatever container the
target has), 32 bits a scale (8 for the E8M0 scales of MXFP4), 32 bits an entry of low-rank factors. Layers in float
are not counted. cost, bops: multiply-adds × weight bits × activation bits; those of a low-rank branch count 32 × 32.

blocks: numbered modules of a list whose name ends in "blocks" or "layers" (`blocks.3`, `transformer_blocks.0`). A value
read by layers of several blocks (a prompt) is nobody's: its activation bits make no block a high one.

Method: knapsack.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Literal

import numpy as np

from vdq_export.calib import knapsack
from vdq_export.calib.formats import Allocated, WeightFormat
from vdq_export.calib.knapsack import Choice, Item
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.sensitivity import Candidate, LayerErrors, Table, measure, resolve
from vdq_export.errors import RecipeError
from vdq_export.graph import Linear
from vdq_export.plan import QuantPlan
from vdq_export.recipe import AllocateRecipe, Recipe
from vdq_export.target_spec import TargetSpec

SCALE_BITS, NARROW_SCALE_BITS, FACTOR_BITS = 32, 8, 32
FRONT_POINTS = 64
_UNIT = {"size": "bits a weight", "bops": "bit operations a multiply-add"}
Measure = Literal["size", "bops"]
_BLOCK = re.compile(r"^(.*?\.)?(\w*(?:blocks|layers))\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Allocation:
    """One point: cost per weight (size) or multiply-add (bops), predicted error, and each layer's candidate.

    gap: no allocation as cheap errs less than error − gap.
    """

    cost: float
    error: float
    candidates: Mapping[str, Candidate]
    gap: float = 0.0


def choose(
    draft: QuantPlan, groups: Mapping[str, Sequence[Linear]], record: CalibrationRecord, spec: TargetSpec
) -> dict[str, Allocated]:
    """What each layer of `groups` gets where the draft's recipe sets a budget; nothing where it sets none.

    Raises RecipeError for a budget that cannot be met, naming the smallest that can.
    """
    recipe, settings = draft.recipe, draft.recipe.allocate
    if not settings.size and not settings.bops:
        return {}
    if settings.size and settings.bops:
        raise RecipeError(f"recipe {recipe.name} sets two budgets, allocate.size and allocate.bops", hint="keep one")
    what: Measure = "size" if settings.size else "bops"
    table = measure(draft, groups, record, spec, candidates(recipe))
    found = best(table, recipe, settings.size or settings.bops, what)
    return explain(table, found, recipe, f"mean {found.cost:.2f} of {settings.size or settings.bops:g} {_UNIT[what]}")


def candidates(recipe: Recipe) -> tuple[Candidate, ...]:
    """Every pair of bits that some layer may take: the ones to allocate, and those that overrides fix."""
    weights, activations = _offered(recipe)
    weights |= {rule.weights for rule in recipe.override if rule.weights}
    activations |= {rule.activations for rule in recipe.override if rule.activations}
    return tuple(Candidate(w, a) for w, a in product(sorted(weights), sorted(activations)))


def best(table: Table, recipe: Recipe, budget: float, what: Measure) -> Allocation:
    """The least summed error at mean cost `budget`. Raises RecipeError when even the cheapest costs more."""
    items, total = _items(table, recipe, what)
    try:
        found = knapsack.best(items, budget * total, _most_high(recipe.allocate))
    except knapsack.Infeasible as error:
        raise _impossible(recipe, what, budget, error.least / total) from error
    return _allocation(table, found, total)


def front(table: Table, recipe: Recipe, what: Measure, points: int = FRONT_POINTS) -> list[Allocation]:
    """From the cheapest allocation to the best: costs rise, errors fall, none can be bettered at its cost.

    points: allocations nearer in cost than this share of the whole span are left out. Raises RecipeError.
    """
    items, total = _items(table, recipe, what)
    try:
        found = knapsack.front(items, _most_high(recipe.allocate), points)
    except knapsack.Infeasible as error:
        raise _impossible(recipe, what, 0.0, error.least / total) from error
    return [_allocation(table, one, total) for one in found]


def explain(table: Table, found: Allocation, recipe: Recipe, budget: str) -> dict[str, Allocated]:
    """The allocation as plans state it."""
    number = {one: i for i, one in enumerate(table.candidates)}
    explained = {}
    for layer in table.layers:
        chosen = found.candidates[layer.name]
        mean = layer.mean
        usable = _usable(layer, table, recipe)
        why = (
            f"allocated: output error {mean[number[chosen]]:.2e}, "
            f"of {len(usable)} candidates from {mean[usable].min():.2e} to {mean[usable].max():.2e}; {budget}"
        )
        explained[layer.name] = resolve(layer.name, chosen, recipe, why)
    return explained


def stored_bits(shape: tuple[int, int], fmt: WeightFormat, rank: int = 0) -> int:
    """Bits of a weight [K, N]: integers, scales, low-rank factors."""
    k, n = shape
    scales = n * (k // fmt.group if fmt.group else 1)
    scale_bits = SCALE_BITS if fmt.scales == "float" else NARROW_SCALE_BITS
    return k * n * fmt.bits + scales * scale_bits + rank * (k + n) * FACTOR_BITS


def bit_operations(rows: int, shape: tuple[int, int], weights: int, activations: int, rank: int = 0) -> int:
    """Multiply-adds × weight bits × activation bits of one call."""
    k, n = shape
    return rows * (k * n * weights * activations + rank * (k + n) * FACTOR_BITS**2)


def block_of(layer: str) -> str:
    """The transformer block a module path lies in, "" for none."""
    found = _BLOCK.match(layer)
    return found.group(0) if found else ""


def _items(table: Table, recipe: Recipe, what: Measure) -> tuple[list[Item], float]:
    """(items of the knapsack, what a mean cost is multiplied with)."""
    spread = {v: {block_of(x.name) for x in table.layers if x.value == v} for v in {x.value for x in table.layers}}
    lowest = {v: min(_keys(table, recipe, v)) for v in spread}
    items, total = [], 0
    for layer in table.layers:
        own = len(spread[layer.value]) == 1
        usable = _usable(layer, table, recipe)
        least = min(table.candidates[i].weights for i in usable)
        mean = layer.mean
        choices = []
        for i in usable:
            one = table.candidates[i]
            high = one.weights > least or (own and one.activations > lowest[layer.value])
            choices.append(Choice(i, _cost(layer, i, what), float(mean[i]), one.activations, high))
        items.append(Item(layer.name, layer.value, tuple(choices), block_of(layer.name)))
        k, n = layer.shape
        total += k * n * (1 if what == "size" else layer.rows)
    return items, float(max(total, 1))


def _keys(table: Table, recipe: Recipe, value: str) -> set[int]:
    """Activation bits that every layer which reads `value` may take. Raises RecipeError where there are none."""
    readers = [x.name for x in table.layers if x.value == value]
    sets = [{c.activations for c in table.candidates if _allowed(name, c, recipe)} for name in readers]
    common = set.intersection(*sets)
    if not common:
        raise RecipeError(
            f"recipe {recipe.name}: {', '.join(readers)} read one value and are to have different activation bits",
            hint="one quantizer serves them: override them alike",
        )
    return common


def _usable(layer: LayerErrors, table: Table, recipe: Recipe) -> list[int]:
    """Numbers of the candidates a layer may take; a branch to choose must store less than the integers beside it."""
    (k, n), found = layer.shape, []
    for number, one in enumerate(table.candidates):
        if _allowed(layer.name, one, recipe) and one.rank * (k + n) * FACTOR_BITS <= k * n * one.weights:
            found.append(number)
    return found


def _allowed(layer: str, one: Candidate, recipe: Recipe) -> bool:
    """Whether a layer may take a candidate: the bits an override gives it, else any of those to allocate."""
    weights, activations = _offered(recipe)
    for rule in recipe.override:
        if fnmatchcase(layer, rule.match):
            weights = {rule.weights} if rule.weights else weights
            activations = {rule.activations} if rule.activations else activations
    return one.weights in weights and one.activations in activations


def _offered(recipe: Recipe) -> tuple[set[int], set[int]]:
    return set(recipe.allocate.weights), set(recipe.allocate.activations or (recipe.activations.bits,))


def _cost(layer: LayerErrors, candidate: int, what: Measure) -> float:
    fmt, rank = layer.formats[candidate], layer.ranks[candidate]
    if what == "size":
        return float(stored_bits(layer.shape, fmt, rank))
    return float(bit_operations(layer.rows, layer.shape, fmt.bits, layer.activations[candidate], rank))


def _most_high(settings: AllocateRecipe) -> int | None:
    return None if settings.high_blocks < 0 else settings.high_blocks


def _allocation(table: Table, found: knapsack.Solution, total: float) -> Allocation:
    picked = {name: table.candidates[label] for name, label in found.labels.items()}
    return Allocation(found.cost / total, found.error, picked, found.gap)


def _impossible(recipe: Recipe, what: Measure, budget: float, least: float) -> RecipeError:
    if not np.isfinite(least):
        return RecipeError(f"recipe {recipe.name}: no bits satisfy its overrides and high_blocks", hint="relax them")
    # rounded up: the smallest budget named must itself be possible
    return RecipeError(
        f"recipe {recipe.name}: no allocation needs as little as {budget:g} {_UNIT[what]}",
        hint=f"the smallest possible is {np.ceil(least * 1000) / 1000:g}",
    )
