"""Which layers, in which bins, have to be float for a bundle's clips to reach a PSNR: few, and none in vain.

What each candidate alone does to the network's output in one step (candidates.py) is where the search begins
(search.py); whether a set suffices is measured on clips made with the bundle's own graphs (trials.py).
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Literal

import msgspec
from msgspec.structs import replace

from vdq_export import sources, targets
from vdq_export.bisect.candidates import Place, candidates, effects
from vdq_export.bisect.cost import Cost, cost
from vdq_export.bisect.fixed_recipe import command, fixed_recipe
from vdq_export.bisect.search import search
from vdq_export.bisect.trials import Trials
from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ModelError, RecipeError
from vdq_export.jsonfile import encode
from vdq_export.model import Model
from vdq_export.progress import Reporter

CLIPS, RUNS = 2, 300


class Effect(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a layer put back to float in one bin does alone, in one step.

    effect: by how much the squared error of the network's output falls, summed over that bin's calls; share: of that
    error of all bins together. Negative where it makes up for the error of others.
    """

    layer: str
    bin: int
    effect: float
    share: float


class Found(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The answer. Decibels are the mean PSNR of `clips` clips: wanted, of the bundle, with every candidate in float,
    and with the members in float.

    members, effects: those to put back, and all candidates, largest effect first. minimal: no member can be left out;
    False where the runs that were allowed did not suffice to show it. recipe: TOML; command: what exports it; both ""
    where no recipe can say it, and `note` why.
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
    members: tuple[Effect, ...] = ()
    effects: tuple[Effect, ...] = ()
    minimal: bool = True
    cost: Cost | None = None
    recipe: str = ""
    command: str = ""
    note: str = ""

    def to_json(self) -> bytes:
        return encode(self, "the result")


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
    """A small set of (layer, bin) that, put back to float, gives clips of `psnr` dB, or `gain` dB more.

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
    found, calls = candidates(bundle, model, reporter)
    with reporter.stage("float clips") as advance:
        trials = Trials(bundle, model, found, clips, advance)
    with closing(trials):
        before = trials(())
        wanted = before + gain if gain is not None else float(psnr or 0.0)
        told = Found(
            outcome="nothing to do",
            wanted_db=wanted,
            bundle_db=before,
            clips=clips,
            candidates=len(found),
            runs=trials.runs,
            seconds=time.perf_counter() - begun,
        )
        if before >= wanted:
            return told
        best = trials(one.place for one in found)
        told = replace(told, outcome="unreachable", runs=trials.runs, float_db=best)
        if best < wanted:
            return replace(told, note=_ahead(bundle), seconds=time.perf_counter() - begun)
        falls, whole = effects(bundle, found, calls, reporter)
        places, fixed, minimal = _searched(trials, falls, (before, wanted, best), runs, reporter)
    every = tuple(
        Effect(layer=place.layer, bin=place.bin, effect=fall, share=fall / whole if whole else 0.0)
        for place, fall in sorted(falls.items(), key=lambda one: -one[1])
    )
    recipe, note = fixed_recipe(bundle, places, f"bisect: back to float for {wanted:.4g} dB")
    return replace(
        told,
        outcome="fixed",
        runs=trials.runs,
        seconds=time.perf_counter() - begun,
        fixed_db=fixed,
        members=tuple(one for one in every if Place(one.layer, one.bin) in places),
        effects=every,
        minimal=minimal,
        cost=cost(bundle, found, places),
        recipe=recipe,
        command=command(bundle, given if isinstance(given, str) else None, out) if recipe else "",
        note=note,
    )


def _searched(
    trials: Trials,
    falls: dict[Place, float],
    decibels: tuple[float, float, float],
    runs: int,
    reporter: Reporter,
) -> tuple[frozenset[Place], float, bool]:
    """(the set, its dB, whether no member can be left out). decibels: of the bundle, wanted, with all in float."""
    before, wanted, best = decibels
    known = {frozenset(falls): best}
    with reporter.stage("search") as advance:

        def error(places: frozenset[Place]) -> float:
            known[places] = trials(places)
            advance(trials.runs, None)
            reporter.note(f"{len(places)} in float: {known[places]:.2f} dB")
            return _error(known[places])

        places, minimal = search(
            falls, error, start=_error(before), floor=_error(best), allowed=_error(wanted), runs=runs
        )
    return places, known[places], minimal


def _error(decibels: float) -> float:
    """Mean squared error of pictures in [0, 1]."""
    return float(10 ** (-decibels / 10))


def _ahead(bundle: Bundle) -> str:
    """What may be lost in layers that no bin's graph has, and what to do about it; "" where there are none."""
    names = list(dict.fromkeys(x.name for plan in bundle.plans for x in plan.layers if x.quantized and x.hoisted))
    if not names:
        return ""
    shown = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
    return f"{len(names)} layers that run ahead have 8-bit weights ({shown}); [[keep_float]] leaves them float"


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
