"""Where commands write: refused when it cannot be, or would spoil something, before they work for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from vdq_export.errors import VdqError


class Output(click.Path):
    """A place to write: a file with one of `suffixes`, or without any a folder. Never inside a bundle, whose manifest
    would not list it; report/ is for people and may be added to.

    Raises VdqError for a place inside a bundle, one that cannot be written, and a file there that is of another kind.
    """

    def __init__(self, *suffixes: str) -> None:
        super().__init__(path_type=Path, dir_okay=not suffixes, file_okay=bool(suffixes))
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value):
            self.fail("the name is empty", param, ctx)
        place = Path(str(super().convert(value, param, ctx)))
        if self._suffixes and place.exists() and place.suffix not in self._suffixes:
            wanted = " or ".join(self._suffixes)
            raise VdqError(f"{place} exists and is no {wanted} file", hint="it would be replaced; choose another name")
        check_place(place)
        return place


def check_place(place: Path) -> None:
    """Raises VdqError for a place within a bundle, and where nothing can be written."""
    from vdq_export.bundle import is_bundle

    whole = Path(os.path.abspath(place))  # noqa: PTH100  (of a link, the link)
    for folder in whole.parents:
        if is_bundle(folder) and whole.relative_to(folder).parts[0] != "report":
            raise VdqError(f"{place} is inside the bundle {folder}", hint="choose a place outside of it")
    there = next(folder for folder in whole.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise VdqError(f"{place} cannot be written: {error.strerror or error}", hint="choose another place") from error
