"""sample:NAME: the trained models that ship with the package."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

import vdq_export.samples
from vdq_export.errors import UnknownNameError
from vdq_export.model import Model

ACCEPTS = "sample:NAME"
_PREFIX = "sample:"


def catalogue() -> dict[str, ModuleType]:
    """Sample name -> the package that loads it."""
    packages = [
        import_module(f"vdq_export.samples.{m.name}") for m in pkgutil.iter_modules(vdq_export.samples.__path__)
    ]
    return {name: package for package in packages for name in package.NAMES}


def accepts(spec: str) -> bool:
    return spec.startswith(_PREFIX)


def load(spec: str) -> Model:
    name, known = spec.removeprefix(_PREFIX), catalogue()
    if name not in known:
        raise UnknownNameError("sample", name, known)
    model: Model = known[name].load(name)
    return model
