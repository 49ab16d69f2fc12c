"""What this machine has, and what each target could do here. Looks, and installs or runs nothing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata, util
from typing import Literal

import msgspec
import onnxruntime
import psutil

from vdq_export import targets
from vdq_export.targets import ort_int8

PACKAGES = (
    "vdq-export", "torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "onnxscript", "diffusers", "transformers",
    "triton", "onnxruntime-qnn", "openvino", "ray",
)  # fmt: skip
PROGRAMS = ("node", "trtexec", "qnn-onnx-converter", "qairt-converter", "nvidia-smi", "chromium")
Means = Literal["runs", "compiles", "writes"]


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """One target on this machine: its bundles can be run ("runs"), compiled for the device but not run ("compiles"), or
    written and checked only ("writes"). detail: with what; missing: what would give more.
    """

    target: str
    can: Means
    detail: str
    missing: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """versions: of packages, "" for those that are not installed. programs: name -> where it is, "" if nowhere."""

    system: str
    python: str
    isa: str
    cores: int
    memory_gib: float
    disk_free_gib: float
    gpus: tuple[str, ...]
    providers: tuple[str, ...]
    versions: dict[str, str]
    programs: dict[str, str]
    targets: tuple[Here, ...]


def diagnose() -> Diagnosis:
    """Look at this machine."""
    gpus = _gpus()
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        isa=ort_int8.detect_isa(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        disk_free_gib=round(shutil.disk_usage(".").free / 2**30, 1),
        gpus=gpus,
        providers=tuple(onnxruntime.get_available_providers()),
        versions={name: _version(name) for name in PACKAGES},
        programs={name: shutil.which(name) or "" for name in PROGRAMS},
        targets=tuple(_here(name, gpus) for name in targets.catalogue()),
    )


def _here(name: str, gpus: tuple[str, ...]) -> Here:
    if name == "cuda":
        return _cuda(gpus)
    if name == "qnn":
        if util.find_spec("onnxruntime_qnn"):
            return Here(target=name, can="runs", detail="offline compiler and HTP emulator of onnxruntime-qnn")
        hint = "pip install 'vdq-export[qnn]' (Linux x86-64): Qualcomm's compiler and emulator"
        return Here(target=name, can="writes", detail="graphs, encodings, lint; onnxruntime checks", missing=hint)
    if name == "openvino":
        if util.find_spec("openvino"):
            return Here(target=name, can="runs", detail="OpenVINO's CPU plugin")
        hint = "pip install 'vdq-export[openvino]'"
        return Here(target=name, can="writes", detail="graphs and lint; onnxruntime checks", missing=hint)
    if name == "tensorrt":
        if shutil.which("trtexec"):
            return Here(target=name, can="compiles", detail="trtexec builds engines: handoff/tensorrt/build.sh")
        return Here(
            target=name, can="writes", detail="graphs and lint; onnxruntime checks", missing="trtexec, and a GPU"
        )
    isa = f", {ort_int8.detect_isa()}" if name == ort_int8.NAME else ""
    return Here(target=name, can="runs", detail=f"onnxruntime's CPU provider{isa}")


def _cuda(gpus: tuple[str, ...]) -> Here:
    triton = util.find_spec("triton") is not None
    if gpus and triton:
        return Here(target="cuda", can="runs", detail=f"fused kernels on {gpus[0]}")
    if triton:
        detail = "kernels compiled ahead; programs in plain torch on the CPU"
        return Here(target="cuda", can="compiles", detail=detail, missing="a GPU that torch can use")
    hint = "pip install 'vdq-export[cuda]', and a GPU that torch can use"
    return Here(target="cuda", can="writes", detail="graphs (--isa jit)", missing=hint)


def _gpus() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
