"""How much each layer's output suffers from each format it could get: the table that bits are allocated by.

    error[b, f] = ‖X'·W' − Q_a(X')·Ŵ_f‖² / ‖X'·W'‖²        over sampled rows of bin b and sampled output channels

Legend: K input channels, N output channels, B bins, F candidates. X' [n, K]: the transformed (smoothed, rotated) rows
of the value a layer reads, W' [K, N] its transformed weight, Q_a the bin's own range at the candidate's bits, Ŵ_f
nearest rounding of W' less the candidate's low-rank branch, plus that branch.

Sampling: at most ROWS of the record's rows over all bins (evenly over bins and their slots), at most COLUMNS output
channels (evenly). A scale belongs to one output channel, so each sampled channel gets exactly the integers it will
have; a low-rank branch is split off the whole weight. What a recipe does after rounding to nearest (GPTQ, clip search)
is not simulated: it helps few bits more than many, so the table overstates what few bits cost and never understates it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vdq_export.calib import low_rank, weight_ranges
from vdq_export.calib.bins import bin_slots
from vdq_export.calib.dynamic import online, quantize_rows
from vdq_export.calib.formats import Allocated, LayerFormat, WeightFormat, asked, assign
from vdq_export.calib.ranges import Grid, activation_range
from vdq_export.calib.record import CalibrationRecord, ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.errors import RecipeError
from vdq_export.graph import Array, Linear
from vdq_export.plan import QuantPlan
from vdq_export.recipe import ActivationRecipe, Recipe
from vdq_export.target_spec import TargetSpec

ROWS = 256
COLUMNS = 256


class Candidate(NamedTuple):
    """One way to store a layer and the value it reads. group, rank: -1 leaves what the recipe gives the layer."""

    weights: int
    activations: int
    group: int = -1
    rank: int = -1


@dataclass(frozen=True)
class LayerErrors:
    """One layer's row of the table: errors [B, F] and, of each candidate, what it really is for this layer."""

    name: str
    value: str
    rows: int  # tokens a call
    shape: tuple[int, int]  # K, N
    errors: Array
    share: Array  # of the calibrated calls that fall into each bin, [B]
    formats: tuple[WeightFormat, ...]
    activations: tuple[int, ...]  # bits
    ranks: tuple[int, ...]

    @property
    def mean(self) -> Array:
        """[F] mean relative error of a call."""
        found: Array = self.share @ self.errors
        return found


@dataclass(frozen=True)
class Table:
    """errors of every layer for the same candidates, in graph order."""

    candidates: tuple[Candidate, ...]
    layers: tuple[LayerErrors, ...]

    def ordered(self, candidate: int = 0) -> list[LayerErrors]:
        """The most sensitive layers first: by the error under one of the candidates."""
        return sorted(self.layers, key=lambda layer: -float(layer.mean[candidate]))


def measure(
    draft: QuantPlan,
    groups: Mapping[str, Sequence[Linear]],
    record: CalibrationRecord,
    spec: TargetSpec,
    candidates: Sequence[Candidate],
) -> Table:
    """The table for linears that hold transformed weights, grouped by the value they read before its transform.

    Raises RecipeError for bits the target lacks, CalibrationError when the record lacks a value.
    """
    if not candidates:
        raise RecipeError(f"recipe {draft.recipe.name}: no bits to choose from", hint="list some in allocate.weights")
    plans = {layer.name: layer for layer in draft.layers}
    ranks = low_rank.choose_ranks([x for members in groups.values() for x in members], draft.recipe.low_rank)
    slots = [bin_slots(one, record.slots) for one in draft.bins]
    calls = np.array([len(one) for one in slots], np.float64)
    layers = []
    for name, members in groups.items():
        inputs = _Inputs(record.value(name), Transform.of(plans[members[0].name]), slots, draft.recipe.activations)
        for linear in members:
            own = [resolve(linear.name, one, draft.recipe) for one in candidates]
            formats = [assign({name: [linear]}, draft.recipe, spec, {linear.name: one})[linear.name] for one in own]
            branch = tuple(one.rank if one.rank >= 0 else ranks.get(linear.name, 0) for one in own)
            layers.append(
                LayerErrors(
                    name=linear.name,
                    value=name,
                    rows=linear.rows,
                    shape=linear.shape,
                    errors=_errors(linear, inputs, formats, branch, draft.recipe),
                    share=calls / calls.sum(),
                    formats=tuple(one.weight for one in formats),
                    activations=tuple(one.activation.bits for one in formats),
                    ranks=branch,
                )
            )
    return Table(tuple(candidates), tuple(layers))


def resolve(layer: str, one: Candidate, recipe: Recipe, why: str = "") -> Allocated:
    """What a candidate means for a layer: the recipe's own overrides say what it leaves open."""
    own = asked(layer, recipe)
    group, rank = one.group if one.group >= 0 else own.group, one.rank if one.rank >= 0 else own.rank
    return Allocated(one.weights, one.activations, why, group, rank)


class _Inputs:
    """Rows of one value a bin, transformed, exact and quantized; each grid is computed once."""

    def __init__(
        self, value: ValueRecord, transform: Transform, slots: Sequence[Sequence[int]], settings: ActivationRecipe
    ) -> None:
        self._value, self._transform, self._slots, self._settings = value, transform, slots, settings
        most = max(1, ROWS // len(slots))
        self.exact = [transform(_evenly(value.sample(one), most)) for one in slots]
        self._known: dict[Grid, list[Array]] = {}

    def quantized(self, grid: Grid) -> list[Array]:
        if grid not in self._known:
            pairs = zip(self.exact, self._slots, strict=True)
            self._known[grid] = [self._quantize(rows, slots, grid) for rows, slots in pairs]
        return self._known[grid]

    def _quantize(self, rows: Array, slots: Sequence[int], grid: Grid) -> Array:
        known = activation_range(self._value, slots, self._settings, grid, self._transform)
        return quantize_rows(rows, online(self._settings, known) or known, grid)


def _errors(
    linear: Linear, inputs: _Inputs, formats: Sequence[LayerFormat], ranks: Sequence[int], recipe: Recipe
) -> Array:
    """[B, F]; 0 where a bin's output is silent."""
    weight = np.asarray(linear.read_weight(), np.float32)
    columns = np.unique(np.linspace(0, weight.shape[1] - 1, min(weight.shape[1], COLUMNS)).astype(np.int64))
    thin = np.ascontiguousarray(weight[:, columns])
    wanted = [rows @ thin for rows in inputs.exact]
    power = [float(np.square(y, dtype=np.float64).sum()) for y in wanted]
    branches = {r: _branch(weight, r, columns) for r in set(ranks)}
    rounded: dict[tuple[WeightFormat, int], Array] = {}
    errors = np.zeros((len(wanted), len(formats)))
    for number, (one, rank) in enumerate(zip(formats, ranks, strict=True)):
        key = (one.weight, rank)
        if key not in rounded:
            residual = thin - branches[rank]
            scale = weight_ranges.scales(residual, one.weight, recipe.weights.range)
            codes = weight_ranges.quantize(residual, scale, one.weight)
            rounded[key] = weight_ranges.dequantize(codes, scale, one.weight)
        # the branch reads the value before its quantizer
        made = zip(inputs.exact, inputs.quantized(one.activation), strict=True)
        for b, (exact, quantized) in enumerate(made):
            error = quantized @ rounded[key] + exact @ branches[rank] - wanted[b]
            errors[b, number] = np.square(error, dtype=np.float64).sum() / power[b] if power[b] > 0 else 0.0
    return errors


def _branch(weight: Array, rank: int, columns: Array) -> Array:
    """The sampled columns of the low-rank branch, [K, n]; zeros without one."""
    if not rank:
        return np.zeros((len(weight), len(columns)), np.float32)
    found = low_rank.split(weight, rank)
    product: Array = found.down @ found.up[:, columns]
    return product


def _evenly(rows: Array, most: int) -> Array:
    picked: Array = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64))]
    return picked
