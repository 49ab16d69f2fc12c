"""Which layers, in which bins, have to be float for a bundle's clips to reach a PSNR: few, and none in vain.

1. Candidates are ordered by their own measured error, largest first (float_layers.py).
2. The shortest run of them from the top that suffices is found by doubling and halving.
3. Halves of it are left out as long as the rest suffices (QuickXplain: Junker, "QUICKXPLAIN: Preferred Explanations and
   Relaxations for Over-Constrained Problems", AAAI 2004), which takes about 2 log n runs a member.
4. Each member that is left is tried without once more.

"Suffices" is always measured, on clips made with the bundle's own graphs. What comes out cannot lose a member. Where
the order misleads, a smaller set of other members may exist, and only trying them all would tell.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import closing
from glob import escape
from typing import Literal, TypeVar

import msgspec
from msgspec.structs import replace

from vdq_export import recipe as recipes
from vdq_export import recipe_toml, sources, targets
from vdq_export.bisect.float_layers import Candidate, Place, Trials, candidates
from vdq_export.bundle import Bundle
from vdq_export.calib.bins import cut, even
from vdq_export.errors import BundleError, ModelError, RecipeError
from vdq_export.jsonfile import encode
from vdq_export.model import Model
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.progress import Reporter
from vdq_export.recipe import Keep, Recipe
from vdq_export.runtime import families
from vdq_export.weights.external_data import FOUR_BIT
from vdq_export.weights.number_grid import numpy_type

CLIPS, RUNS = 2, 300
T = TypeVar("T", bound=Hashable)
Enough = Callable[[frozenset[T]], bool]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Member(_Data, frozen=True):
    """A layer to be float in one bin. sqnr_db: of its own error there, quantized."""

    layer: str
    bin: int
    sqnr_db: float


class Cost(_Data, frozen=True):
    """What the fix costs. bytes: of weights, more than before; share: that of the bytes of the bundle.

    float_before, float_after: shares of the multiply-adds of a clip's linears that are in float. bins: whose graphs
    change. sessions_before, sessions_after: that the CPU runtime needs, which bins of one structure share.
    """

    bytes: int
    share: float
    float_before: float
    float_after: float
    bins: tuple[int, ...]
    sessions_before: int
    sessions_after: int


class Found(_Data, frozen=True):
    """The answer. Decibels are the mean PSNR of `clips` clips: wanted, of the bundle, with every candidate in float,
    and with the members in float.

    minimal: no member can be left out; False where the runs that were allowed did not suffice to show it. recipe:
    TOML; command: what exports it.
    """

    outcome: Literal["fixed", "nothing to do", "unreachable"]
    wanted_db: float
    bundle_db: float
    clips: int
    candidates: int
    runs: int
    seconds: float
    float_db: float | None = None
    fixed_db: float | None = None
    members: tuple[Member, ...] = ()
    minimal: bool = True
    cost: Cost | None = None
    recipe: str = ""
    command: str = ""

    def to_json(self) -> bytes:
        return encode(self, "the result")


# -- the search ------------------------------------------------------------------------------------------------------


def smallest(ordered: Sequence[T], enough: Enough[T]) -> tuple[T, ...]:
    """Members of `ordered`, most promising first, that are enough, none of which can be left out.

    enough: known to hold for all of `ordered` and not for nothing; the more members, the better, mostly: where it is
    not so, what comes out is enough all the same. At most `most_calls()` calls then.
    """
    first = list(ordered[: _shortest(ordered, enough)])
    needed = _needed([], first, False, enough)
    if not enough(frozenset(needed)):  # more was not always better
        needed = first
    tried = -1
    while tried != len(needed):  # once, unless more was not always better
        tried = len(needed)
        for one in tuple(reversed(needed)):
            rest = [x for x in needed if x != one]
            if rest and enough(frozenset(rest)):
                needed = rest
    return tuple(needed)


def most_calls(count: int, found: int) -> int:
    """Calls that smallest() needs at most to find `found` of `count` members, where more members are never worse."""
    log = max(1, (count - 1).bit_length())
    return 2 * log + 2 + 2 * found * (log + 1) + 1 + found


def _shortest(ordered: Sequence[T], enough: Enough[T]) -> int:
    """How many from the top are enough: the least number, by doubling and halving."""
    low, high = 0, 1
    while high < len(ordered) and not enough(frozenset(ordered[:high])):
        low, high = high, 2 * high
    high = min(high, len(ordered))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(frozenset(ordered[:middle])) else (middle, high)
    return high


def _needed(given: list[T], items: list[T], is_new: bool, enough: Enough[T]) -> list[T]:
    """Those of `items` that are needed beside `given`. is_new: it is not known whether `given` alone is enough."""
    if is_new and enough(frozenset(given)):
        return []
    if len(items) == 1:
        return items
    half = len(items) // 2
    first, second = items[:half], items[half:]
    of_second = _needed(given + first, second, True, enough)
    of_first = _needed(given + of_second, first, bool(of_second), enough)
    return of_first + of_second


class _Spent(Exception):
    """No runs are left."""


class _Measured:
    """enough() by measurement, each set once; the smallest set that was enough so far is kept."""

    def __init__(
        self, trials: Callable[[Iterable[Place]], float], wanted: float, runs: int, reporter: Reporter
    ) -> None:
        self._trials, self._wanted, self._left, self._reporter = trials, wanted, runs, reporter
        self.known: dict[frozenset[Place], float] = {}
        self.best: frozenset[Place] | None = None

    def db(self, places: frozenset[Place]) -> float:
        if places not in self.known:
            if self._left <= 0:
                raise _Spent
            self._left -= 1
            self.known[places] = self._trials(places)
            self._reporter.note(f"{len(places)} in float: {self.known[places]:.2f} dB")
        if self.known[places] >= self._wanted and (self.best is None or len(places) < len(self.best)):
            self.best = places
        return self.known[places]

    def __call__(self, places: frozenset[Place]) -> bool:
        return self.db(places) >= self._wanted


def bisect(
    bundle: Bundle,
    model: Model | str | None = None,
    *,
    psnr: float | None = None,
    gain: float | None = None,
    clips: int = CLIPS,
    runs: int = RUNS,
    reporter: Reporter | None = None,
    out: str = "fix.toml",
) -> Found:
    """The smallest set of (layer, bin) that, put back to float, gives clips of `psnr` dB, or `gain` dB more.

    runs: times that clips are made at most, beside those of the bundle and of everything in float. out: what the
    recipe will be called, for the command.
    Raises RecipeError for a target that leaves nothing in float, ModelError for a model without a sampler or another
    one than the bundle's, BundleError for a bundle without a plan.
    """
    begun, reporter = time.perf_counter(), reporter or Reporter()
    _check(bundle)
    given, model = model, sources.of_bundle(bundle.manifest.model.name, model)
    if model.sampler is None:
        raise ModelError(
            f"{model.name} has no sampler, so there are no clips to measure",
            hint="give its Model a sampler; `vdq-export verify` compares layers without one",
        )
    found = candidates(bundle, model, reporter)
    with reporter.stage("float clips") as advance:
        trials = Trials(bundle, model, found, clips, advance)
    with closing(trials), reporter.stage("search") as advance:

        def run(places: Iterable[Place]) -> float:
            db = trials(places)
            advance(trials.runs, None)
            return db

        before = run(())
        wanted = before + gain if gain is not None else float(psnr or 0.0)
        told = Found(
            outcome="nothing to do",
            wanted_db=wanted,
            bundle_db=before,
            clips=clips,
            candidates=len(found),
            runs=1,
            seconds=time.perf_counter() - begun,
        )
        if before >= wanted:
            return told
        measured = _Measured(run, wanted, runs + 1, reporter)
        measured.known[frozenset()] = before
        places, minimal = tuple(one.place for one in found), True
        highest = measured.db(frozenset(places))
        told = replace(told, outcome="unreachable", runs=trials.runs, float_db=highest)
        if highest < wanted:
            return replace(told, seconds=time.perf_counter() - begun)
        try:
            places = smallest(places, measured)
        except _Spent:
            places, minimal = tuple(x for x in places if x in (measured.best or ())), False
        members = [one for one in found if one.place in places]
        recipe = fixed_recipe(bundle, [one.place for one in members], f"bisect: back to float for {wanted:.4g} dB")
        return replace(
            told,
            outcome="fixed",
            runs=trials.runs,
            seconds=time.perf_counter() - begun,
            fixed_db=measured.known[frozenset(places)],
            members=tuple(Member(layer=x.place.layer, bin=x.place.bin, sqnr_db=x.sqnr_db) for x in members),
            minimal=minimal,
            cost=cost(bundle, found, members),
            recipe=recipe,
            command=_command(bundle, given if isinstance(given, str) else None, out),
        )


def _check(bundle: Bundle) -> None:
    if not bundle.plans or bundle.manifest.recipe is None:
        raise BundleError(f"{bundle.path} carries no plan and recipe", hint="export it again")
    spec = targets.load(bundle.manifest.target).spec(bundle.manifest.isa)
    if spec.every_operator:
        bits = max(spec.activation_dtype)
        raise RecipeError(
            f"{spec.name} leaves nothing in float, so nothing can be put back",
            hint=f"give the weakest layers of `vdq-export verify` {bits} bits: [[override]] activations = {bits}",
        )


# -- the cost --------------------------------------------------------------------------------------------------------


def cost(bundle: Bundle, found: Sequence[Candidate], members: Sequence[Candidate]) -> Cost:
    """What it costs to have `members` of `found` in float."""
    chosen = frozenset(one.place for one in members)
    more = 0
    for (weights, name), layer in {(x.weights, x.place.layer): x.plan for x in members}.items():
        quantized = [x.place for x in found if (x.weights, x.place.layer) == (weights, name)]
        more += 0 if any(layer.float_in) else 4 * layer.shape[0] * layer.shape[1]  # else stored already
        more -= _integer_bytes(layer) if chosen.issuperset(quantized) else 0  # nobody reads them any more
    work = {place: n for plan in bundle.plans for place, n in _work(plan).items()}
    in_float = {
        Place(layer.name, one.index)
        for plan in bundle.plans
        for one in plan.bins
        for layer in plan.of_bin(one).layers
        if not layer.quantized
    }
    total = sum(work.values()) or 1
    graphs = [bundle.graph_path(index) for index in range(len(bundle.schedule.bins))]
    alike = {index: number for number, one in enumerate(families.find(graphs)) for index in one.bins}
    structures = {(alike[i], frozenset(x.layer for x in chosen if x.bin == i)) for i in range(len(graphs))}
    return Cost(
        bytes=more,
        share=more / bundle.size,
        float_before=sum(work[place] for place in in_float) / total,
        float_after=sum(work[place] for place in in_float | chosen) / total,
        bins=tuple(sorted({place.bin for place in chosen})),
        sessions_before=len(set(alike.values())),
        sessions_after=len(structures),
    )


def _work(plan: QuantPlan) -> dict[Place, int]:
    """Multiply-adds of each linear of the bins' graphs in one branch of a clip."""
    return {
        Place(layer.name, one.index): layer.rows * layer.shape[0] * layer.shape[1] * max(1, len(one.steps))
        for layer in plan.of_bins().layers
        for one in plan.bins
    }


def _integer_bytes(layer: LayerPlan) -> int:
    assert layer.weight is not None
    k, n = layer.shape
    return k * n // 2 if layer.weight.dtype in FOUR_BIT else k * n * numpy_type(layer.weight.dtype).itemsize


# -- the recipe ------------------------------------------------------------------------------------------------------


def fixed_recipe(bundle: Bundle, places: Iterable[Place], why: str) -> str:
    """TOML of the bundle's own recipe with `places` in float, and with its bins: they are numbered.

    It extends that recipe by name where the package has it, and holds it in full where it was made elsewhere.
    """
    own = bundle.manifest.recipe
    assert own is not None
    bins: dict[str, list[int]] = {}
    for place in sorted(places):
        bins.setdefault(place.layer, []).append(place.bin)
    rules = tuple(Keep(match=escape(layer), why=why, bins=tuple(numbers)) for layer, numbers in bins.items())
    fixed = replace(
        own,
        name=f"{own.name}-fixed",
        summary=f"{own.summary}; {sum(len(one) for one in bins.values())} (layer, bin) back to float",
        tsw=_tsw(bundle.plans, own),
        keep_float=(*own.keep_float, *rules),
    )
    text = recipe_toml.extending(fixed, own.name) if own.name in recipes.names() else None
    return text or recipe_toml.dump(fixed)


def _tsw(plans: Sequence[QuantPlan], own: Recipe) -> int | Literal["auto", "all"] | tuple[float, ...]:
    """What gives the bins there are; the recipe's own where no single setting does."""
    cuts = []
    for expert, precision, branch in dict.fromkeys((p.expert, p.precision, b.branch) for p in plans for b in p.bins):
        bins = [
            b for p in plans if (p.expert, p.precision) == (expert, precision) for b in p.bins if b.branch == branch
        ]
        bins.sort(key=lambda one: one.t, reverse=True)
        starts = [sum(len(one.steps) for one in bins[:i]) for i in range(len(bins))]
        cuts.append((sum(len(one.steps) for one in bins), starts))
    count = len(cuts[0][1])
    if all(starts == even(steps, count) for steps, starts in cuts):
        return count
    shares = tuple(start / cuts[0][0] for start in cuts[0][1][1:])
    return shares if all(starts == cut(steps, shares) for steps, starts in cuts) else own.tsw


def _command(bundle: Bundle, model: str | None, out: str) -> str:
    manifest = bundle.manifest
    words = [model or manifest.model.name, "--target", manifest.target, "--isa", manifest.isa, "--recipe", out]
    words += [] if bundle.schedule.hoisted else ["--no-hoist"]
    return shlex.join(["vdq-export", *words, "--out", f"{bundle.path.resolve().name}-fixed"])
