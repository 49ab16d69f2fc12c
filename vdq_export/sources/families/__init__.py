"""Families of video transformers: one file each, with FAMILY = Family(…), found by listing this folder.

A new family is a new file here and nothing else: published and tiny configurations, shapes, inputs, defaults.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from vdq_export.sources.families._family import (
    CHANNELS,
    TEXT_WIDTHS,
    Config,
    Family,
    Input,
    Published,
    Size,
    Tiny,
    even_sigmas,
    mask,
    text,
    text_and_mask,
    text_width,
)

__all__ = [
    "CHANNELS",
    "FAMILIES",
    "TEXT_WIDTHS",
    "Config",
    "Family",
    "Input",
    "Published",
    "Size",
    "Tiny",
    "even_sigmas",
    "find",
    "mask",
    "text",
    "text_and_mask",
    "text_width",
]

_MODULES = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
FAMILIES: tuple[Family, ...] = tuple(module.FAMILY for module in _MODULES if hasattr(module, "FAMILY"))


def find(class_name: str) -> Family | None:
    """The family of a transformer class, if it has a file."""
    return next((one for one in FAMILIES if one.class_name == class_name), None)
