"""onnxruntime's QNN provider (package onnxruntime-qnn): found, and registered once in a process.

On Linux x86-64 its HTP library is the offline compiler with an emulator behind it; on a Snapdragon it drives the NPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import onnxruntime as ort

from vdq_export.devices import vendor_tool
from vdq_export.errors import MissingToolError

PROVIDER = "QNNExecutionProvider"
_TOOL = "onnxruntime-qnn"
_CAPTURE = threading.RLock()
_C_LIBRARY = "ucrtbase" if os.name == "nt" else None  # None: the one this process is linked to


def available() -> bool:
    """Whether onnxruntime-qnn is installed here (it is not loaded by asking)."""
    return importlib.util.find_spec("onnxruntime_qnn") is not None


def devices() -> list[Any]:
    """onnxruntime's devices of the provider: the NPU where there is one, else the one that stands for the emulator.

    For SessionOptions.add_provider_for_devices. Raises MissingToolError without the package, or where it cannot load.
    """
    found = vendor_tool.devices(PROVIDER, _package().get_library_path(), _TOOL)
    npu = [device for device in found if device.device.type == ort.OrtHardwareDeviceType.NPU]
    if not found:
        raise MissingToolError("onnxruntime-qnn is installed, but finds nothing to compile for")
    return npu or found


def htp_library() -> str:
    """Path of the HTP library, for the provider option "backend_path"."""
    path: str = _package().get_qnn_htp_path()
    return path


def htp_options(arch: str) -> dict[str, str]:
    """Provider options of a session for the HTP `arch` ("v75"); Q/DQ of the inputs and outputs runs there too."""
    return {
        "backend_path": htp_library(),
        "htp_arch": arch.removeprefix("v"),
        "offload_graph_io_quantization": "0",
    }


@contextmanager
def held_back(said: list[str]) -> Iterator[None]:
    """Redirect file descriptors 1 and 2, which the backend writes to past Python; the text is appended to `said`."""
    with _CAPTURE, tempfile.TemporaryFile() as catch:
        saved: list[tuple[int, int]] = []
        flush: Any = ctypes.CDLL(_C_LIBRARY).fflush  # the backend's lines wait in C's buffers
        _flush_python()
        flush(None)
        try:
            for descriptor in (1, 2):
                saved.append((descriptor, os.dup(descriptor)))
                os.dup2(catch.fileno(), descriptor)
            yield
        finally:
            _flush_python()
            flush(None)
            for descriptor, original in saved:
                os.dup2(original, descriptor)
                os.close(original)
            catch.seek(0)
            said.append(catch.read().decode("utf-8", "replace"))


def _flush_python() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _package() -> ModuleType:
    hint = "pip install 'vdq-export[qnn]' (Linux x86-64), or onnxruntime-qnn itself on a Snapdragon"
    return vendor_tool.module("onnxruntime_qnn", _TOOL, hint)
