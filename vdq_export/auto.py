"""`--recipe auto --budget …`: search bits, group size, branch rank and activation bits of every layer.

1. The base recipe (recipes/auto.toml) is planned once: it gives calibration record, smoothing, rotation and bins.
2. calib.sensitivity measures each layer under every combination the target runs.
3. calib.allocate turns that table into the front: for each size, the allocation with the least summed error.
4. `size` and `bops` budgets are solved exactly on the table. For `quality`, summed error is too coarse a promise: the
   front is halved by exporting and measuring, and the cheapest point that was measured to suffice is taken. (That takes
   quality to rise with size along the front; a dip between two measured points stays unseen.)

What comes back is an ordinary recipe with an override a layer, exported and saved like any other.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from itertools import count, product
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.table import Table as RichTable

from vdq_export import compiler, sources, targets
from vdq_export import recipe as recipes
from vdq_export.calib import allocate
from vdq_export.calib.allocate import Allocation
from vdq_export.calib.draft import by_value
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.sensitivity import Candidate, LayerErrors, Table, measure
from vdq_export.errors import RecipeError, nearest
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.progress import Reporter
from vdq_export.quality import Meter, calibrated
from vdq_export.recipe import AllocateRecipe, Override, Recipe
from vdq_export.target_spec import TargetSpec
from vdq_export.trace import trace

BASE = "auto"
EXAMPLES = "for example size=4.2bit, bops=32 or quality=35dB"
RANKS = (0, 16)
MOST_BITS = 8  # weights beyond add size and nothing to see
USUAL_BITS = 8
POINTS = 24  # of the front
MARGIN_DB = 1.0  # verify looks at other clips than the search did
_BUDGET = re.compile(r"(size|bops|quality)\s*=\s*([0-9]*\.?[0-9]+)\s*([a-z]*)", re.IGNORECASE)
_UNITS = {"size": ("", "bit", "bits"), "bops": ("",), "quality": ("", "db")}


@dataclass(frozen=True)
class Budget:
    """size: mean bits a weight; bops: mean weight bits × activation bits; quality: dB against the float model."""

    kind: Literal["size", "bops", "quality"]
    amount: float

    @staticmethod
    def parse(text: str) -> Budget:
        """Raises RecipeError, with examples, for what is no budget."""
        found = _BUDGET.fullmatch(text.strip())
        if found is None or found[3].lower() not in _UNITS[found[1].lower()] or float(found[2]) <= 0:
            name = text.partition("=")[0].strip().lower()
            hint = EXAMPLES if name in _UNITS else f"{EXAMPLES}; {nearest(name, _UNITS)}"
            raise RecipeError(f"--budget {text}: not a budget", hint=hint)
        kind: Any = found[1].lower()
        return Budget(kind, float(found[2]))

    @property
    def measure(self) -> allocate.Measure:
        """What the front is ordered by."""
        return "bops" if self.kind == "bops" else "size"

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}{ {'size': 'bit', 'bops': '', 'quality': 'dB'}[self.kind] }"


@dataclass(frozen=True)
class Point:
    """One allocation of the front; db: measured, where it was."""

    allocation: Allocation
    db: float | None = None

    @property
    def cost(self) -> float:
        return self.allocation.cost

    def bits(self) -> dict[tuple[int, int], int]:
        """{(weight bits, activation bits): layers}"""
        return dict(sorted(Counter((c.weights, c.activations) for c in self.allocation.candidates.values()).items()))


@dataclass(frozen=True)
class Found:
    """The chosen recipe, the front it was chosen from (cheapest first), and how."""

    recipe: Recipe
    front: tuple[Point, ...]
    chosen: int
    budget: Budget
    how: str = ""  # what the decibels are

    def text(self) -> str:
        point = self.front[self.chosen]
        unit = "bits a weight" if self.budget.measure == "size" else "bit operations a multiply-add"
        measured = "" if point.db is None else f", {self.how} {point.db:.1f} dB"
        return f"{self.budget}: {point.cost:.2f} {unit}, summed relative error {point.allocation.error:.3g}{measured}"

    def table(self) -> RichTable:
        """The front, the chosen point marked."""
        table = RichTable("", self.budget.measure, "summed error", "measured dB", "layers by weight/activation bits")
        for number, point in enumerate(self.front):
            layers = " ".join(f"{count}×{w}/{a}" for (w, a), count in point.bits().items())
            mark = "→" if number == self.chosen else ""
            measured = "" if point.db is None else f"{point.db:.1f}"
            table.add_row(mark, f"{point.cost:.3f}", f"{point.allocation.error:.3g}", measured, layers)
        return table

    def builtins(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "budget": str(self.budget),
            "chosen": self.chosen,
            "measured": self.how,
            "front": [
                {
                    "cost": p.cost,
                    "error": p.allocation.error,
                    "db": p.db,
                    "layers": {f"{w}/{a}": n for (w, a), n in p.bits().items()},
                }
                for p in self.front
            ],
        }


def search(
    model: Model | str,
    *,
    budget: str | Budget,
    target: str = "ort-int8",
    tsw: int | str | None = None,
    isa: str | None = None,
    base: str | Recipe = BASE,
    calibration: Path | None = None,
    save_calibration: Path | None = None,
    traced: Mapping[str, Graph] | None = None,
    clips: int = 2,
    reporter: Reporter | None = None,
    **choices: Any,
) -> Found:
    """The recipe that meets `budget` on `target`; what it does not name is as make_plan() takes it.

    base: what the recipe starts from. clips: how many are compared for a `quality` budget, given a sampler.

    Raises RecipeError for a budget that is none or cannot be met, naming the best that can.
    """
    wanted = Budget.parse(budget) if isinstance(budget, str) else budget
    reporter = reporter or Reporter()
    start = base if isinstance(base, Recipe) else recipes.load(base)
    spec = targets.load(target).spec(isa)
    offered = combinations(spec, start)
    start = _starting(start, offered)
    model = sources.resolve(model)
    wants_held_out = wanted.kind == "quality" and calibration is None
    choices = {"target": target, "tsw": tsw, "isa": isa, **choices}
    with tempfile.TemporaryDirectory(prefix="vdq-auto-") as folder:
        network = calibrated(model) if wants_held_out else model
        partial = network is not model  # a record of some trajectories is nothing to keep
        record = calibration or (None if partial else save_calibration) or Path(folder) / "record.safetensors"
        traced = traced or {expert: trace(one) for expert, one in network.networks()}
        experts = [expert for expert in traced if expert]
        table = measure_all(network, start, offered, record, calibration is None, traced, choices, reporter)
        points = [Point(one) for one in allocate.front(table, start, wanted.measure, POINTS)]
        if wanted.kind != "quality":
            return _solved(table, start, points, wanted, experts)
        meter = Meter(model, Path(folder), record, traced, choices, clips, blind=calibration is None)
        with reporter.stage("measure") as advance:
            done, most = count(1), 1 + (len(points) - 1).bit_length()

            def counted(recipe: Recipe) -> float:
                found = meter(recipe)
                advance(next(done), most)
                return found

            return _measured(points, start, wanted, experts, counted, meter.how)


def combinations(spec: TargetSpec, base: Recipe) -> tuple[Candidate, ...]:
    """Everything a layer could be on the target; groups and branches for weights below 8 bits, which is where they pay.

    Where the target says which types one kernel multiplies, those only, and without groups: no such kernel takes them.
    """
    found = []
    groups = (0,) if spec.integer else (0, *spec.groups)
    weights = sorted(b for b in spec.weight_dtype.keys() & spec.weight_qmax.keys() if b <= MOST_BITS)
    for w, a in product(weights, sorted(spec.activation_dtype)):
        if spec.integer and (spec.activation_dtype[a], spec.weight_dtype[w]) not in spec.integer:
            continue
        few = w < MOST_BITS
        for group, rank in product(groups if few else (0,), RANKS if few else (0,)):
            found.append(Candidate(w, a, group, rank))
    if not found:
        raise RecipeError(f"{spec.name} has no integer formats to choose from", hint=f"recipe {base.name} needs some")
    return tuple(found)


# -- the table -------------------------------------------------------------------------------------------------------


def measure_all(
    model: Model,
    base: Recipe,
    offered: Sequence[Candidate],
    record: Path,
    observe: bool,
    traced: Mapping[str, Graph],
    choices: Mapping[str, Any],
    reporter: Reporter,
) -> Table:
    """The table of every layer of every expert. Layers and values of experts have the expert's name in front."""
    change = msgspec.structs.replace
    plain = change(
        base, weights=change(base.weights, rounding="nearest"), activations=change(base.activations, clip=())
    )
    asked: dict[str, Any] = {**choices, "save_calibration" if observe else "calibration": record}
    copies = {expert: graph.copy() for expert, graph in traced.items()}
    planned = compiler.make_plan(model, recipe=plain, traced=copies, reporter=reporter, **asked)
    layers: list[LayerErrors] = []
    with reporter.stage("sensitivity") as advance:
        for done, part in enumerate(planned.parts):
            plan = part.plans[0]
            path = compiler.record_path(record, plan.expert)
            assert path is not None
            values = {layer.name: layer.value for layer in plan.layers if layer.quantized}
            groups = by_value([x for x in part.graph.linears() if x.name in values], values)
            table = measure(plan, groups, CalibrationRecord.load(path), planned.spec, offered)
            layers += [_of_expert(layer, plan.expert) for layer in table.layers]
            advance(done + 1, len(planned.parts))
    if len({layer.name for layer in layers}) < len(layers):
        raise RecipeError(f"recipe {base.name} gives every bin its own weights", hint="choose smoothing other than tsq")
    return Table(tuple(offered), tuple(layers))


def _of_expert(layer: LayerErrors, expert: str) -> LayerErrors:
    return replace(layer, name=f"{expert}.{layer.name}", value=f"{expert}.{layer.value}") if expert else layer


def _starting(base: Recipe, offered: Sequence[Candidate]) -> Recipe:
    """The base, open to all that is offered; itself at few weight bits and usual activation bits, which is what
    smoothing and bins are chosen for."""
    weights, activations = sorted({c.weights for c in offered}), sorted({c.activations for c in offered})
    usual = max([a for a in activations if a <= USUAL_BITS], default=activations[0])
    settings = {"weights": weights, "activations": activations, "high_blocks": base.allocate.high_blocks}
    return _with_bits(base, Candidate(weights[0], usual, 0, 0), msgspec.convert(settings, AllocateRecipe))


# -- the recipe ------------------------------------------------------------------------------------------------------


def recipe_for(start: Recipe, chosen: Allocation, wanted: Budget, experts: Sequence[str] = ()) -> Recipe:
    """`start` with the most common candidate as its own and an override for each layer that has another one."""
    common = Counter(chosen.candidates.values()).most_common(1)[0][0]
    rules: dict[str, list[dict[str, Any]]] = {expert: [] for expert in experts}
    why = f"allocated for {wanted}"
    for name, one in chosen.candidates.items():
        expert = next((e for e in experts if name.startswith(f"{e}.")), "")
        if one != common:
            layer = name.removeprefix(f"{expert}.") if expert else name
            rules.setdefault(expert, []).append({"match": escape(layer), "why": why, **one._asdict()})
    whole = _with_bits(start, common, AllocateRecipe())
    verify = whole.verify
    if wanted.kind == "quality":
        verify = msgspec.structs.replace(verify, min_psnr_db=wanted.amount - MARGIN_DB)
    tables = {}
    for expert in (e for e in experts if rules[e]):
        own = whole.expert.get(expert, {})
        tables[expert] = {**own, "override": [*own.get("override", []), *rules[expert]]}
    return msgspec.structs.replace(
        whole,
        summary=f"{start.summary}: {wanted}",
        override=(*whole.override, *msgspec.convert(rules.get("", []), list[Override])),
        expert={**whole.expert, **tables},
        verify=verify,
    )


def _with_bits(recipe: Recipe, one: Candidate, allocate_: AllocateRecipe) -> Recipe:
    weights = {"bits": one.weights, "group": one.group}
    settings = msgspec.to_builtins(recipe)
    settings["weights"] |= weights
    settings["activations"] |= {"bits": one.activations}
    settings["low_rank"] = {"rank": one.rank}
    settings["allocate"] = msgspec.to_builtins(allocate_)
    return msgspec.convert(settings, Recipe)


# -- the choice ------------------------------------------------------------------------------------------------------


def _solved(table: Table, start: Recipe, points: Sequence[Point], wanted: Budget, experts: Sequence[str]) -> Found:
    best = allocate.best(table, start, wanted.amount, wanted.measure)
    kept = [p for p in points if p.allocation.candidates != best.candidates]
    front = sorted([*kept, Point(best)], key=lambda p: p.cost)
    chosen = next(i for i, p in enumerate(front) if p.allocation is best)
    return Found(recipe_for(start, best, wanted, experts), tuple(front), chosen, wanted)


def _measured(
    points: Sequence[Point],
    start: Recipe,
    wanted: Budget,
    experts: Sequence[str],
    meter: Callable[[Recipe], float],
    how: str,
) -> Found:
    """The cheapest point that was measured to suffice: the last one must, then halve."""
    known: dict[int, float] = {}

    def enough(index: int) -> bool:
        if index not in known:
            known[index] = meter(recipe_for(start, points[index].allocation, wanted, experts))
        return known[index] >= wanted.amount

    low, high = 0, len(points) - 1
    if not enough(high):
        raise RecipeError(
            f"--budget {wanted}: out of reach, the best allocation has {known[high]:.1f} dB ({how}) "
            f"at {points[high].cost:.2f} bits a weight",
            hint=f"ask for at most quality={np.floor(known[high] * 10) / 10:g}dB",
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    front = tuple(replace(p, db=known.get(i)) for i, p in enumerate(points))
    return Found(recipe_for(start, front[high].allocation, wanted, experts), front, high, wanted, how)
