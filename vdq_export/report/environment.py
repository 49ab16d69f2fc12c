"""The files in templates/: what they give with values filled in, and what is put into a page as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def fill(template: str, values: Mapping[str, Any], filters: Mapping[str, Callable[..., str]] | None = None) -> bytes:
    """The page, UTF-8. Values are text wherever they stand; a name that the template lacks a value for is an error."""
    environment = Environment(
        loader=PackageLoader("vdq_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    return environment.get_template(template).render(**values).encode()


@cache
def asset(name: str) -> Markup:
    """A file of templates/ as it stands: it is ours, and holds nothing of a bundle."""
    return Markup((resources.files("vdq_export.report") / "templates" / name).read_text(encoding="utf-8"))
