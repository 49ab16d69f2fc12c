"""What this machine has, and what each target could do here. Looks, and installs or runs nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Literal

import msgspec
import onnxruntime
import psutil

from vdq_export import targets
from vdq_export.targets import cuda, ort_int8

PACKAGES = (
    "vdq-export", "torch", "onnx", "onnxruntime", "onnx-graphsurgeon", "onnxscript", "diffusers", "transformers",
    "jinja2", "bokeh", "triton", "onnxruntime-qnn", "openvino", "onnxruntime-openvino", "onnxruntime-ep-openvino",
    "ray",
)  # fmt: skip
PROGRAMS = ("node", "trtexec", "qnn-onnx-converter", "qairt-converter", "nvidia-smi", "chromium")
DRIVER = Path("/proc/driver/nvidia/version")
Means = Literal["runs", "compiles", "writes"]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One that torch can use. arch: "sm_90"; kernels: the architecture whose kernels it runs, "" for none."""

    name: str
    arch: str
    memory_gib: float
    kernels: str


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """One target on this machine: its bundles can be run ("runs"), compiled for the device but not run ("compiles"), or
    written and checked only ("writes"). detail: with what; missing: what would give more. isas: what --isa takes.
    """

    target: str
    can: Means
    detail: str
    missing: str = ""
    isas: tuple[str, ...] = ()


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """versions: of packages, "" for those that are not installed. programs: name -> where it is, "" if nowhere.
    cuda: that torch was built for, "" without; driver: of NVIDIA's kernel module, "" where none is loaded.
    """

    system: str
    python: str
    isa: str
    cores: int
    memory_gib: float
    disk_free_gib: float
    gpus: tuple[Gpu, ...]
    cuda: str
    driver: str
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
        cuda=_cuda_version(),
        driver=_driver(),
        providers=tuple(onnxruntime.get_available_providers()),
        versions={name: _version(name) for name in PACKAGES},
        programs={name: shutil.which(name) or "" for name in PROGRAMS},
        targets=tuple(
            msgspec.structs.replace(_here(name, gpus), isas=module.spec().isas)
            for name, module in targets.catalogue().items()
        ),
    )


def _here(name: str, gpus: tuple[Gpu, ...]) -> Here:
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


def _cuda(gpus: tuple[Gpu, ...]) -> Here:
    triton = util.find_spec("triton") is not None
    if triton and (fit := [one for one in gpus if one.kernels]):
        return Here(target="cuda", can="runs", detail=f"fused kernels of {fit[0].kernels} on {fit[0].name}")
    if triton:
        detail = "kernels compiled ahead; programs in plain torch on the CPU"
        return Here(target="cuda", can="compiles", detail=detail, missing="a GPU that torch can use")
    hint = "pip install 'vdq-export[cuda]', and a GPU that torch can use"
    return Here(target="cuda", can="writes", detail="graphs (--isa jit)", missing=hint)


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    # Machine code runs on its own generation from the revision it was compiled for: 8.6 takes what 8.0 does.
    fit = [(own, name) for name in cuda.ISAS if (own := _capability(name))[0] == major and own[1] <= minor]
    return Gpu(
        name=torch.cuda.get_device_name(index),
        arch=f"sm_{major}{minor}",
        memory_gib=round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
        kernels=max(fit)[1] if fit else "",
    )


def _capability(arch: str) -> tuple[int, int]:
    """(9, 0) of "sm_90"."""
    major, minor = divmod(int(arch.removeprefix("sm_")), 10)
    return major, minor


def _cuda_version() -> str:
    import torch

    return torch.version.cuda or ""


def _driver() -> str:
    try:
        told = DRIVER.read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\d+(\.\d+)+", told)
    return found.group() if found else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
