"""Names in a recipe that mean nothing in a network: a layer that its author wanted protected would ship unprotected.

Asked of the author's own rules only: those of the recipes that ship are for many networks, and stand here unmatched by
right, as they do in a recipe that extends one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache

from vdq_export import recipe as recipes
from vdq_export.errors import RecipeError, StrictError, nearest
from vdq_export.progress import Reporter
from vdq_export.recipe import Recipe


def check_experts(recipe: Recipe, model: str, experts: Sequence[str]) -> None:
    """Raises RecipeError for a table of an expert that the model, named `model`, has not. experts: "" names none."""
    known = [name for name in experts if name]
    for name, table in recipe.expert.items():
        if name not in known and not any(one.expert.get(name) == table for one in _shipped()):
            hint = nearest(name, known) if known else f"leave [expert.{name}] out"
            raise RecipeError(f"recipe {recipe.name}: {model} has no expert {name!r}", hint=hint)


def check_matches(recipe: Recipe, layers: Iterable[str], reporter: Reporter, *, strict: bool = False) -> None:
    """Tell each pattern of `recipe` that none of `layers` has; with `strict`, raise StrictError for the first."""
    names = list(dict.fromkeys(layers))
    for what, pattern in _own(recipe):
        if pattern == recipes.LAST or any(fnmatchcase(name, pattern) for name in names):
            continue
        near = get_close_matches(pattern, _patterns(names), n=1, cutoff=0.6)
        text = f"recipe {recipe.name}: {what} {pattern!r} matches no layer"
        if strict:
            raise StrictError(f"--strict: {text}", hint=f"did you mean {near[0]}?" if near else "see `vdq-export plan`")
        reporter.warn(f"{text}{f'; did you mean {near[0]}?' if near else ', so it does nothing'}")


def _own(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(table, pattern) of the rules that no recipe that ships has."""
    found = set(_all(recipe)).difference(*(_all(one) for one in _shipped()))
    return (rule for rule in dict.fromkeys(_all(recipe)) if rule in found)


def _all(recipe: Recipe) -> list[tuple[str, str]]:
    return [
        *(("keep_float", rule.match) for rule in recipe.keep_float),
        *(("override", rule.match) for rule in recipe.override),
        *(("rotation", pattern) for pattern in recipe.rotation.match),
        *(("low_rank", pattern) for pattern in recipe.low_rank.match),
    ]


@cache
def _shipped() -> tuple[Recipe, ...]:
    return tuple(recipes.load(name) for name in recipes.names())


def _patterns(names: Sequence[str]) -> list[str]:
    """What somebody may have meant: the names, and all that begin, end or lie in the middle as one of them."""
    found = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts)):
            found |= dict.fromkeys((f"{'.'.join(parts[:end])}.*", f"*.{'.'.join(parts[end:])}", f"*.{parts[end]}.*"))
    return list(found)
