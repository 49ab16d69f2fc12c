"""Where models come from: one file a kind of source, found by listing this folder.

Each file has ACCEPTS (what a person types), `accepts(spec) -> bool` and `load(spec) -> Model`.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from vdq_export.errors import ModelError
from vdq_export.model import Model

DEFAULT = "sample:digits"


def kinds() -> list[ModuleType]:
    """The source modules, by name."""
    return [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]


def resolve(spec: Model | str) -> Model:
    """The model a MODEL argument means; a Model is returned as it is. Its name becomes the argument.

    Raises ModelError when no source knows the argument or the source cannot load it.
    """
    if isinstance(spec, Model):
        return spec
    for kind in kinds():
        if kind.accepts(spec):
            model: Model = kind.load(spec)
            model.name = spec
            return model
    forms = ", ".join(kind.ACCEPTS for kind in kinds())
    raise ModelError(
        f"cannot find a model at {spec!r}", hint=f"a model is one of: {forms}; commands: vdq-export --help"
    )
