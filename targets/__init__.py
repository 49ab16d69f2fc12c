"""Deployment targets, one a file or folder, found by listing this folder.

A target module has NAME, PASSES (its own passes, after `qdq`), `spec(isa=None) -> TargetSpec`,
`session_options(spec) -> dict` and `integer_layers(optimised_model, plan) -> {layer: bool}`. It may have FORMS (exact
rewrites of the float graph that its compiler needs, before calibration) and `hand_off(writer, {path: graph}, spec,
reporter)`, which writes its files and returns the graphs to lint where they are not the bundle's own; and
`fused_layers(root, bin, plan) -> {layer: bool}` where not onnxruntime's graph says what runs in integers.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from vdq_export.errors import UnknownNameError


def catalogue() -> dict[str, ModuleType]:
    """Target name -> its module."""
    modules = [
        import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")
    ]
    return {module.NAME: module for module in modules}


def load(name: str) -> ModuleType:
    """Raises UnknownNameError with the nearest names."""
    known = catalogue()
    if name not in known:
        raise UnknownNameError("target", name, known)
    return known[name]


def forms(name: str) -> tuple[str, ...]:
    """The canonical forms that a target wants beside everybody's, in order."""
    found: tuple[str, ...] = getattr(load(name), "FORMS", ())
    return found
