"""Where models come from: one file a kind of source, found by listing this folder.

Each file has ACCEPTS (what a person types), `accepts(spec) -> bool` and `load(spec) -> Model`. One whose shapes can be
chosen has TAKES_OPTIONS = True and `load(spec, options) -> Model`. Modules without ACCEPTS are what such files share.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from vdq_export.errors import ModelError
from vdq_export.model import Model
from vdq_export.sources import _options, _remote_code

DEFAULT = "sample:digits"


def kinds() -> list[ModuleType]:
    """The source modules, by name."""
    modules = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return [module for module in modules if hasattr(module, "ACCEPTS")]


def allow_remote_code() -> None:
    """From here on, code that comes with a model's folder may run. Never implied by a MODEL argument."""
    _remote_code.allow()


def with_options(spec: str, **chosen: object) -> str:
    """The MODEL argument that means `spec` with these options (None: not chosen): "PATH?frames=17&height=256"."""
    return _options.join(spec, chosen)


def of_bundle(name: str, model: Model | str | None = None) -> Model:
    """The float model of a bundle that was made from `name`; `model` says which, where the name is none.

    Raises ModelError as resolve() does, and for a bundle of a Model that was made in Python.
    """
    if model is None and not any(kind.accepts(_options.split(name)[0]) for kind in kinds()):
        raise ModelError(
            f"this bundle was made from a Model called {name!r}, which cannot be found by that name",
            hint="say --model package.module:factory, or model= in Python",
        )
    return resolve(name if model is None else model)


def resolve(spec: Model | str) -> Model:
    """The model a MODEL argument means; a Model is returned as it is. Its name becomes the argument.

    Raises ModelError when no source knows the argument, the source cannot load it, or takes no options.
    """
    if isinstance(spec, Model):
        return spec
    plain, query = _options.split(spec)
    for kind in kinds():
        if kind.accepts(plain):
            options = _options.parse(query, spec)
            if getattr(kind, "TAKES_OPTIONS", False):
                model: Model = kind.load(plain, options)
            elif query:
                raise ModelError(
                    f"{plain} takes no {' or '.join(options.names())}",
                    hint="its shapes and schedule are fixed; these options are for folders of diffusers models",
                )
            else:
                model = kind.load(plain)
            model.name = spec
            return model
    forms = ", ".join(kind.ACCEPTS for kind in kinds() if kind.ACCEPTS)
    raise ModelError(
        f"cannot find a model at {plain!r}", hint=f"a model is one of: {forms}; commands: vdq-export --help"
    )
