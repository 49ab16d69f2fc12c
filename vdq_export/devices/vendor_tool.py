"""Vendors' packages that a job may need: imported when it does, their onnxruntime providers registered once."""

from __future__ import annotations

import importlib
import threading
from types import ModuleType
from typing import Any

import onnxruntime as ort

from vdq_export.errors import MissingToolError

_REGISTERING = threading.Lock()


def module(name: str, tool: str, hint: str) -> ModuleType:
    """The module `name` of `tool`. Raises MissingToolError, with the hint where the package is not there at all."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingToolError(f"{tool} is not installed", hint=hint) from error
        raise MissingToolError(f"{tool} does not load: {error}") from error


def devices(provider: str, library: str, tool: str) -> list[Any]:
    """onnxruntime's devices of a provider that is a plugin; `library`, its file, is registered at the first call.

    Raises MissingToolError for a library that does not load. An empty list: it supports nothing that is here.
    """
    with _REGISTERING:
        found = _listed(provider)
        if not found:
            try:
                ort.register_execution_provider_library(provider, library)
            except Exception as error:  # onnxruntime's own errors have no common class
                raise MissingToolError(f"{tool} does not load: {error}") from error
            found = _listed(provider)
    return found


def _listed(provider: str) -> list[Any]:
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]
