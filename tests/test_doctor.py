"""The doctor tells what is here: nothing that is not, and every target."""

from __future__ import annotations

import json
import shutil
from importlib import metadata, util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import command
from vdq_export import targets
from vdq_export.doctor import diagnose


def test_the_command_tells_every_target_and_true_versions(tmp_path: Path) -> None:
    code, out, err = command("doctor", "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [one["target"] for one in found["targets"]] == list(targets.catalogue())
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


def test_a_gpu_and_trtexec_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(util, "find_spec", lambda name, *_: object())
    real = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, *rest: f"/{name}" if name == "trtexec" else real(name, *rest))
    found = diagnose()
    can = {one.target: one.can for one in found.targets}
    assert found.gpus == ("GPU 0", "GPU 1") and can["cuda"] == "runs" and can["tensorrt"] == "compiles"
