"""The doctor tells what is here: nothing that is not, and every target."""

from __future__ import annotations

import json
import shutil
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.commands import command
from vdq_export import doctor, targets
from vdq_export.doctor import diagnose


def test_the_command_tells_every_target_and_true_versions(tmp_path: Path) -> None:
    code, out, err = command("doctor", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [one["target"] for one in found["targets"]] == list(targets.catalogue())
    assert next(one for one in found["targets"] if one["target"] == "qnn")["isas"] == ["v73", "v75", "v79", "v81"]
    assert found["versions"]["torch"] == metadata.version("torch") and found["cores"] > 0
    code, out, _ = command("doctor", cwd=tmp_path)
    assert code == 0 and all(name in out for name in targets.catalogue())


@pytest.mark.parametrize(
    ("target", "package", "without", "having"),
    [("qnn", "onnxruntime_qnn", "writes", "runs"), ("openvino", "openvino", "writes", "runs"),
     ("cuda", "triton", "writes", "compiles")],
)  # fmt: skip
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, target: str, package: str, without: str, having: str
) -> None:
    def told() -> Any:
        return next(one for one in diagnose().targets if one.target == target)

    real = util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    assert told().can == without and "pip install" in told().missing
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: object() if name == package else real(name, *rest))
    assert told().can == having


def test_a_gpu_and_trtexec_are_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (8, 6))[index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    told = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2.0"
    (tmp_path / "version").write_text(told, encoding="utf-8")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(util, "find_spec", lambda name, *_: object())
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: f"/{name}" if name == "trtexec" else real(name, *rest))
    found = diagnose()
    can = {one.target: one.can for one in found.targets}
    assert [(one.name, one.arch, one.kernels, one.memory_gib) for one in found.gpus] == [
        ("GPU 0", "sm_75", "", 16.0),
        ("GPU 1", "sm_86", "sm_80", 16.0),
    ]
    assert (found.cuda, found.driver) == ("12.9", "580.95.05")
    assert can["cuda"] == "runs" and can["tensorrt"] == "compiles"
    (cuda,) = (one for one in found.targets if one.target == "cuda")
    assert cuda.detail == "fused kernels of sm_80 on GPU 1", "not the first one, which is too old"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert {one.target: one.can for one in diagnose().targets}["cuda"] == "compiles"
