"""Recipes: which method, with which settings, as TOML. Frozen and strict: an unknown key is an error.

A recipe says how numbers are chosen, never what they are; `calib` turns recipe + record into a QuantPlan.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vdq_export.errors import RecipeError, UnknownNameError

Alpha = Annotated[float, Meta(ge=0.0, le=1.0)]


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class WeightRecipe(_Settings, frozen=True):
    """Weights: symmetric, one scale per output channel. `mse` narrows each range to the least squared error."""

    bits: Literal[4, 6, 8, 16] = 8
    range: Literal["minmax", "mse"] = "minmax"


class ActivationRecipe(_Settings, frozen=True):
    """Activations: asymmetric, one scale and zero_point per tensor and bin. `percentile` is two-sided, in percent."""

    bits: Literal[4, 6, 8, 16] = 8
    range: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: Annotated[float, Meta(gt=50.0, le=100.0)] = 99.99
    per_branch: bool = False  # True: conditional and unconditional calls get bins of their own


class SmoothingRecipe(_Settings, frozen=True):
    """Channel smoothing X/s · sW. `asq`: one s for all timesteps from a running mean (arXiv text in docs/methods.md).

    `alpha` is the migration strength; "search" tries 0.1 … 1.0 by 0.1 per layer or, with `scope = "global"`, once.
    """

    kind: Literal["none", "asq"] = "none"
    alpha: Alpha | Literal["search"] = 0.5
    scope: Literal["layer", "global"] = "layer"
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95


class Keep(_Settings, frozen=True):
    """Layers left in float: `match` is a shell pattern over module paths, `why` goes into plan and report."""

    match: str
    why: str


class VerifyRecipe(_Settings, frozen=True):
    """Thresholds of `verify`; one that is missed makes it fail, naming layer and bin."""

    min_psnr_db: float = 30.0
    min_layer_sqnr_db: float = 12.0
    min_integer_coverage: Annotated[float, Meta(ge=0.0, le=1.0)] = 1.0
    max_float_error: float = 1e-4
    max_judge_drop: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1


class Recipe(_Settings, frozen=True):
    """One named way of quantizing; `name`, `summary` and `source` are for people."""

    name: str
    summary: str
    source: str = ""
    format: Literal[1] = 1
    weights: WeightRecipe = WeightRecipe()
    activations: ActivationRecipe = ActivationRecipe()
    smoothing: SmoothingRecipe = SmoothingRecipe()
    keep_float: tuple[Keep, ...] = ()
    verify: VerifyRecipe = VerifyRecipe()


def names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    files = resources.files("vdq_export").joinpath("recipes").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def load(name_or_path: str | Path) -> Recipe:
    """The recipe with that name, or in that TOML file, with `extends` resolved.

    Raises UnknownNameError for a name nobody knows, RecipeError for a file that is no recipe.
    """
    return _convert(_resolve(str(name_or_path), seen=()), str(name_or_path))


def _convert(settings: dict[str, Any], origin: str) -> Recipe:
    try:
        return msgspec.convert(settings, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"recipe {origin}: {error}", hint="see docs/recipes.md for the keys") from error


def _resolve(origin: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if origin in seen:
        raise RecipeError(f"recipe {origin} extends itself: {' -> '.join((*seen, origin))}")
    settings = _read(origin)
    parent = settings.pop("extends", None)
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise RecipeError(f"recipe {origin}: extends must be a name or a path, got {parent!r}")
    if parent.endswith(".toml") and not Path(parent).is_absolute():
        parent = str(Path(origin).parent / parent)
    return _merge(_resolve(parent, (*seen, origin)), settings)


def _read(origin: str) -> dict[str, Any]:
    path = Path(origin)
    is_file = path.suffix == ".toml"
    if not is_file and origin not in names():
        raise UnknownNameError("recipe", origin, names())
    source = path if is_file else resources.files("vdq_export").joinpath("recipes", f"{origin}.toml")
    try:
        return tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"recipe {origin}: {error}") from error


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; tables merge key by key, lists are appended to the base's."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            merged[key] = [*old, *value]
        else:
            merged[key] = value
    return merged
