"""The --budget of the commands that plan: search a recipe first, then go on with what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdq_export import auto, recipe_toml
from vdq_export.disk import write_whole
from vdq_export.errors import RecipeError
from vdq_export.progress import Reporter

SEARCHED = ("calibration", "save_calibration", "optimal_bins", "hoist", "by_blocks", "tsw", "isa", "workers", "work")


def resolve(model: str, choices: dict[str, Any], reporter: Reporter) -> tuple[dict[str, Any], auto.Found | None]:
    """(choices for the compiler, with the recipe that meets --budget in place of the named one; the search if any).

    Raises RecipeError for --recipe auto without a budget, --save-recipe without a search, and as auto.search() does.
    """
    rest = {name: value for name, value in choices.items() if value is not None}
    if "calibration" in rest and "save_calibration" in rest:
        raise RecipeError("--calibration takes a record, --save-calibration keeps a new one", hint="say one of them")
    budget, place = rest.pop("budget", None), rest.pop("save_recipe", None)
    if budget is None:
        if rest["recipe"] == auto.BASE:
            raise RecipeError(
                "--recipe auto searches for a budget, and there is none", hint=f"--budget, {auto.EXAMPLES}"
            )
        if place is not None:
            raise RecipeError("--save-recipe keeps what a search found", hint=f"--budget, {auto.EXAMPLES}")
        return rest, None
    asked = {name: rest[name] for name in SEARCHED if name in rest}
    found = auto.search(model, budget=budget, target=rest["target"], base=rest["recipe"], reporter=reporter, **asked)
    if place is not None:
        write_whole(Path(place), recipe_toml.dump(found.recipe).encode())
    if (kept := rest.get("save_calibration")) is not None and Path(kept).is_file():
        rest = {**rest, "calibration": kept, "save_calibration": None}  # the search has made it
    return {**rest, "recipe": found.recipe}, found
