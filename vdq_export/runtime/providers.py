"""What sessions run on: onnxruntime's providers by name, or a recipe for one that comes as a package of its own.

| recipe | package | device |
|---|---|---|
| ort-qnn-ep | onnxruntime-qnn | the Hexagon NPU of a Snapdragon; on Linux x86-64 its emulator (slow: for checks) |
| ort-openvino-ep | onnxruntime-openvino, in place of onnxruntime | OpenVINO's CPU plugin |
| ort-openvino-ep | onnxruntime-ep-openvino, beside onnxruntime | the same; it lists Intel's devices only |
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from vdq_export.bundle import Bundle
from vdq_export.devices import openvino_runtime, qnn_provider, vendor_tool
from vdq_export.errors import MissingToolError, UnknownNameError

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
DEFAULT_ARCH = "v75"
# Set to 1, as bundles for the HTP want it on the CPU, the provider ends the process ("Expected to process N nodes").
_QNN_ENTRIES = {"session.disable_quant_qdq": "0"}
# Without it OpenVINO computes float parts in bfloat16 where the machine can, and rounds inputs of integer linears.
_OPENVINO_CONFIG = json.dumps({"CPU": openvino_runtime.SETTINGS})

_greeted = threading.Event()


@dataclass(frozen=True)
class Backend:
    """providers: names (or (name, options) pairs) for onnxruntime; or `devices` of a provider that came as a plugin,
    with its `options`. entries: onnxruntime config entries it needs; None: those of the bundle, which are for the
    providers that the bundle names. arch: of the HTP, "" elsewhere. compiled: it loads contexts compiled before.
    """

    providers: tuple[Any, ...] = (CPU,)
    devices: tuple[Any, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, str] | None = None
    arch: str = ""
    compiled: bool = False

    @property
    def on_cpu(self) -> bool:
        """Whether graphs run on onnxruntime's own CPU kernels alone, whose ways with memory and constants are known."""
        return not self.devices and list(self.providers) == [CPU]

    def settings(self, bundle: Bundle, wanted: Mapping[str, str]) -> dict[str, str]:
        """onnxruntime config entries: the caller's win over the bundle's, what the backend needs over both."""
        return {**bundle.manifest.session, **wanted} if self.entries is None else {**wanted, **self.entries}

    def session(self, model: str | bytes, settings: ort.SessionOptions) -> ort.InferenceSession:
        if not self.devices:
            return ort.InferenceSession(model, settings, providers=list(self.providers))
        settings.add_provider_for_devices(list(self.devices), dict(self.options))
        if self.arch and not _greeted.is_set():
            # The QNN library writes a line to stdout at its first session; what the host prints there may be JSON. At
            # later ones, made in the background, holding back would swallow the host's own lines.
            with qnn_provider.held_back([]):
                made = ort.InferenceSession(model, settings)
            _greeted.set()
            return made
        return ort.InferenceSession(model, settings)

    def graph(self, bundle: Bundle, path: Path) -> Path:
        """What to load for the bundle's graph at `path`: its compiled context where there is one for this device."""
        context = f"contexts/{self.arch}/{path.stem}_ctx.onnx"
        return bundle.path / context if self.compiled and bundle.manifest.file(context) else path


def choose(wanted: str | Sequence[Any] | None, bundle: Bundle) -> Backend:
    """The backend of a recipe name, of onnxruntime's own names, or, for None, what the bundle says.

    Raises UnknownNameError for a recipe that does not exist, MissingToolError for one whose package is not installed.
    """
    if not isinstance(wanted, str):
        return Backend(tuple(wanted or bundle.manifest.providers))
    if wanted in RECIPES:
        return RECIPES[wanted](bundle)
    if wanted in ort.get_available_providers():
        return Backend((wanted,))
    if wanted in ort.get_all_providers():
        there = ", ".join(ort.get_available_providers())
        raise MissingToolError(f"this onnxruntime has no {wanted}; it has {there}", hint="install one that does")
    raise UnknownNameError("provider recipe", wanted, [*RECIPES, *ort.get_available_providers()])


def _qnn(bundle: Bundle) -> Backend:
    """The NPU where there is one. Elsewhere the emulator of the architecture the bundle was made for, which compiles
    every graph when it is loaded: it does not load contexts whose weights are shared.
    """
    with qnn_provider.held_back([]):
        devices = qnn_provider.devices()
    arch = bundle.manifest.isa if bundle.manifest.target == "qnn" else DEFAULT_ARCH
    options = qnn_provider.htp_options(arch)
    on_npu = any(device.device.type == ort.OrtHardwareDeviceType.NPU for device in devices)
    entries = dict(_QNN_ENTRIES)
    if on_npu:
        del options["htp_arch"]  # it knows its own
        if any(entry.path.startswith(f"contexts/{arch}/") for entry in bundle.manifest.files):
            entries["ep.share_ep_contexts"] = "1"  # bins whose contexts are one binary load it once
    return Backend((), tuple(devices), options, entries, arch, compiled=on_npu)


def _openvino(bundle: Bundle) -> Backend:
    if OPENVINO in ort.get_available_providers():
        options = {"device_type": "CPU", "load_config": _OPENVINO_CONFIG}
        return Backend(((OPENVINO, options), CPU), entries={})
    tool = "OpenVINO's provider for onnxruntime"
    hint = "pip install onnxruntime-ep-openvino (Intel devices), or onnxruntime-openvino in place of onnxruntime"
    plugin = vendor_tool.module("onnxruntime_ep_openvino", tool, hint)
    found = vendor_tool.devices(plugin.get_ep_name(), plugin.get_library_path(), tool)
    devices = [one for one in found if one.device.type == ort.OrtHardwareDeviceType.CPU]
    if not devices:
        raise MissingToolError(
            "onnxruntime-ep-openvino finds no CPU it supports: it lists Intel's only",
            hint="onnxruntime-openvino in place of onnxruntime takes others",
        )
    return Backend((), tuple(devices), {"load_config": _OPENVINO_CONFIG}, {})


RECIPES: dict[str, Callable[[Bundle], Backend]] = {"ort-qnn-ep": _qnn, "ort-openvino-ep": _openvino}
