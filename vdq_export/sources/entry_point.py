"""package.module:factory: a callable without arguments that returns a vdq_export.Model."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from vdq_export.errors import ModelError, UnknownNameError, VdqError
from vdq_export.model import Model

ACCEPTS = "package.module:factory"
_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def accepts(spec: str) -> bool:
    return _FORM.fullmatch(spec) is not None and not spec.startswith("sample:")  # that is the other source's


def load(spec: str) -> Model:
    """Import and call the factory; the current folder counts as importable, as with `python -m`."""
    module_name, factory_name = spec.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        wanted = f"a module, not a file: {module_name.removesuffix('.py')}:{factory_name}"
        hint = wanted if module_name.endswith(".py") else "run where it can be imported"
        raise ModelError(f"{spec}: no module named {error.name!r}", hint=hint) from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{spec}: importing {module_name} failed: {_one_line(error)}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise UnknownNameError(f"function of {module_name}", factory_name, _functions(module))
    try:
        model = factory()
    except VdqError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{spec} failed: {_one_line(error)}", hint="call it in Python to see where") from error
    if not isinstance(model, Model):
        raise ModelError(f"{spec} returned {type(model).__name__}", hint="return a vdq_export.Model")
    return model


def _functions(module: ModuleType) -> list[str]:
    """Those that the module defines itself and that may be meant."""
    found = [name for name, one in vars(module).items() if callable(one) and not name.startswith("_")]
    return [name for name in found if getattr(vars(module)[name], "__module__", "") == module.__name__]


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
