"""A recipe as the TOML file that loads as the same recipe. What has its default value is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from vdq_export import recipe as recipes
from vdq_export.recipe import Keep, Override, Recipe

_ENTRIES = {"override": Override(match="", why=""), "keep_float": Keep(match="", why="")}  # defaults of list entries
_ALWAYS = {"name", "summary", "match", "why"}


def dump(recipe: Recipe, whole: Collection[str] = ()) -> str:
    """Text that recipe.load() reads back as `recipe`. whole: settings and tables written with their defaults too."""
    given = msgspec.to_builtins(recipe)
    settings = _differing(given, msgspec.to_builtins(Recipe(name="", summary="")))
    settings |= {name: given[name] for name in whole}
    for name, default in _ENTRIES.items():
        if name in settings:
            settings[name] = [_differing(one, msgspec.to_builtins(default)) for one in settings[name]]
    return "\n".join(_table(settings, ())).strip() + "\n"


def extending(recipe: Recipe, parent: str) -> str | None:
    """Text that extends the recipe named `parent` and loads as `recipe`.

    None where there is no such text: what is in a parent's lists cannot be taken out.
    """
    base = msgspec.to_builtins(recipes.load(parent))
    settings = _differing(msgspec.to_builtins(recipe), base, always=())
    for name, default in _ENTRIES.items():
        if name in settings:  # entries are appended to the parent's
            added = settings[name][len(base[name]) :]
            settings[name] = [_differing(one, msgspec.to_builtins(default)) for one in added]
    text = "\n".join([f"extends = {_value(parent)}", *_table(settings, ())]) + "\n"
    return text if recipes.parse(text) == recipe else None


def _differing(
    settings: Mapping[str, Any], default: Mapping[str, Any], always: Collection[str] = _ALWAYS
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict) and default[key]:
            value = _differing(value, default[key], ())  # a table of its own has a default for `match`
            if value:
                found[key] = value
        elif key in always or value != default.get(key):
            found[key] = value
    return found


def _table(settings: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """Lines of one table: its plain values first, as TOML wants it, then its tables and arrays of tables."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in settings.items() if not _is_table(v) and not _is_tables(v)]
    for key, value in settings.items():
        name = ".".join(_key(k) for k in (*path, key))
        if _is_table(value):
            lines += ["", f"[{name}]", *_table(value, (*path, key))]
        elif _is_tables(value):
            for one in value:
                lines += ["", f"[[{name}]]", *_table(one, (*path, key))]
    return lines


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_tables(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, dict) for one in value)


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _value(key)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    raise TypeError(f"no TOML for {type(value).__name__}")
