"""Code that comes with a model: refused, unless the person at the keyboard allowed it for this run.

Never part of a MODEL argument: a bundle made elsewhere carries that and must not bring the permission with it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from vdq_export.errors import ModelError

_ALLOWED = ContextVar("allowed", default=False)
_MODULE = re.compile(r"(\w+/)?\w+")


def allow() -> None:
    """From here on, folders' own code may run."""
    _ALLOWED.set(True)


@contextmanager
def allowed() -> Iterator[None]:
    """Folders' own code may run meanwhile."""
    token = _ALLOWED.set(True)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def load(folder: Path, module: str, name: str, origin: Path) -> Any:
    """The class `name` of folder/module.py, named by the file `origin`.

    Raises ModelError unless that is allowed, and where there is none.
    """
    file = folder / f"{module}.py"
    if not _ALLOWED.get():
        raise ModelError(
            f"{origin} asks for code of its own ({file.name}: {name}), which is not run",
            hint="read the code, then --allow-remote-code; or write a factory and give package.module:factory",
        )
    if not _MODULE.fullmatch(module) or not file.is_file():
        raise ModelError(f"{origin} names {module}.py, which is not in {folder}", hint="fetch the whole folder")
    path = f"_vdq_remote_{abs(hash(str(file.resolve())))}"
    spec = importlib.util.spec_from_file_location(path, file)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[path] = made
    try:
        spec.loader.exec_module(made)
        return getattr(made, name)
    except Exception as error:
        raise ModelError(f"{file}: {type(error).__name__}: {' '.join(str(error).split())}", hint="mend it") from error
