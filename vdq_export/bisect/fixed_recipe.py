"""The recipe and the command that export a bundle with some of its layers in float."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from glob import escape

from msgspec.structs import replace

from vdq_export import recipe as recipes
from vdq_export import recipe_toml
from vdq_export.bisect.candidates import Place
from vdq_export.bundle import Bundle
from vdq_export.calib.bins import cut, even
from vdq_export.plan import QuantPlan
from vdq_export.recipe import Keep


def fixed_recipe(bundle: Bundle, places: Iterable[Place], why: str) -> tuple[str, str]:
    """(TOML of the bundle's own recipe with `places` in float, and with its bins: they are numbered; ""),
    or ("", why no recipe can say that).

    It extends that recipe by name where the package has it, and holds it in full where it was made elsewhere.
    """
    own = bundle.manifest.recipe
    assert own is not None
    tsw = _tsw(bundle.plans)
    if tsw is None:
        return "", (
            "no recipe: these bins were chosen for each expert or branch apart, no one `tsw` gives them again, and the "
            "members go by their numbers; export with a number of even bins (--tsw 4) and bisect that"
        )
    bins: dict[str, list[int]] = {}
    for place in sorted(places):
        bins.setdefault(place.layer, []).append(place.bin)
    rules = tuple(Keep(match=escape(layer), why=why, bins=tuple(numbers)) for layer, numbers in bins.items())
    fixed = replace(
        own,
        name=f"{own.name}-fixed",
        summary=f"{own.summary}; {sum(len(one) for one in bins.values())} (layer, bin) back to float",
        tsw=tsw,
        keep_float=(*own.keep_float, *rules),
    )
    text = recipe_toml.extending(fixed, own.name) if own.name in recipes.names() else None
    return text or recipe_toml.dump(fixed), ""


def _tsw(plans: Sequence[QuantPlan]) -> int | tuple[float, ...] | None:
    """What gives the bins there are; None where no single setting does."""
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
    return shares if all(starts == cut(steps, shares) for steps, starts in cuts) else None


def command(bundle: Bundle, model: str | None, out: str) -> str:
    """What exports `bundle` anew, with the recipe `out`. model: as the caller named it, None: as the bundle does."""
    manifest = bundle.manifest
    words = [model or manifest.model.name, "--target", manifest.target, "--isa", manifest.isa, "--recipe", out]
    words += [] if bundle.schedule.hoisted else ["--no-hoist"]
    return shlex.join(["vdq-export", *words, "--out", f"{bundle.path.resolve().name}-fixed"])
