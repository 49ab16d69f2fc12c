"""The compiler: types, flow, input and output. Quantization mathematics lives in calib, rewrites in passes.

The names below load what they need on first use, so that `import vdq_export` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdq_export.bundle import Bundle
    from vdq_export.compiler import export
    from vdq_export.experts import Expert, Experts
    from vdq_export.model import Model
    from vdq_export.runtime import load

_HOMES = {
    "Bundle": "vdq_export.bundle",
    "Expert": "vdq_export.experts",
    "Experts": "vdq_export.experts",
    "Model": "vdq_export.model",
    "export": "vdq_export.compiler",
    "load": "vdq_export.runtime",
}

__all__ = ["Bundle", "Expert", "Experts", "Model", "export", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
