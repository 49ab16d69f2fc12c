"""Units on a Ray cluster: the bundle of this machine's processes, whoever dies on the way; and what is said without."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from filecmp import cmpfiles
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.commands import ENVIRONMENT, ROOT, assert_one_line, command
from vdq_export.errors import EngineError, MissingToolError
from vdq_export.work.engine import load

# Ray finds its own address without these, and tells its makers nothing.
ALONE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_AUTO_CONNECT": "0"}
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or os.name != "posix", reason="Ray is not installed, or no POSIX signals"
)


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """(folder of the bundles, what tests.ray_cases says, processes of Ray that it left)."""
    folder = tmp_path_factory.mktemp("ray")
    mark = {"VDQ_RAY_CASES_RUN": folder.name}  # which every process of the cluster inherits
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray_cases", str(folder)],
        cwd=ROOT,
        env={**ENVIRONMENT, **ALONE, **mark},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return folder, told, [one.name() for one in psutil.process_iter() if _carries(one, mark)]


def _carries(process: psutil.Process, mark: dict[str, str]) -> bool:
    try:
        return mark.items() <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@needs_ray
def test_a_cluster_whose_processes_and_machine_die_makes_the_same_bundle(
    died: tuple[Path, dict[str, Any], list[str]],
) -> None:
    folder, told, _ = died
    assert told["died"] == ["died-calibration", "died-machine", "died-solving"]
    assert told["alive"] == 1, "of two machines"
    files = sorted(str(p.relative_to(folder / "local")) for p in (folder / "local").rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(folder / "ray")) for p in (folder / "ray").rglob("*") if p.is_file())
    same, different, unreadable = cmpfiles(folder / "local", folder / "ray", files, shallow=False)
    assert (different, unreadable) == ([], []) and "manifest.json" in same


@needs_ray
def test_nothing_of_the_cluster_is_left(died: tuple[Path, dict[str, Any], list[str]]) -> None:
    assert died[2] == []


def test_without_ray_the_command_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')")
    result = command("--engine", "ray", "--out", tmp_path / "out", cwd=tmp_path)
    assert_one_line(result, "--engine ray needs Ray", "pip install 'vdq-export[ray]'")
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("out")] == []


def test_an_unknown_engine_is_refused_before_any_work(tmp_path: Path) -> None:
    result = command("--engine", "slurm", "--out", "out", cwd=tmp_path)
    assert_one_line(result, "unknown engine 'slurm'", "known: local, ray, ray://HOST:PORT")
    assert list(tmp_path.iterdir()) == []


class FakeRay(types.ModuleType):
    """As much of Ray as connecting needs; `refused`: addresses where nobody answers."""

    def __init__(self, *refused: str) -> None:
        super().__init__("ray")
        self.refused, self.calls = refused, list[str]()

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, **settings: Any) -> None:
        self.calls.append(address)
        if address in self.refused:
            raise ConnectionError("nobody\nanswers")

    def remote(self, **settings: Any) -> Any:
        self.calls.append(f"python {'PYTHONPATH' in settings['runtime_env']['env_vars']}")
        return lambda function: function

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize(
    ("name", "refused", "calls"),
    [
        ("ray", (), ["auto", "python False", "shutdown"]),
        ("ray", ("auto",), ["auto", "local", "python True", "shutdown"]),
        ("ray://far:10001", (), ["ray://far:10001", "python False", "shutdown"]),
    ],
)
def test_a_cluster_is_joined_or_started(
    name: str, refused: tuple[str, ...], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRay(*refused)
    monkeypatch.setitem(sys.modules, "ray", fake)
    with load(name) as engine:
        assert engine.is_remote
        print("not among results")
    assert fake.calls == calls


@pytest.mark.parametrize(("name", "refused"), [("ray://far:10001", "ray://far:10001"), ("ray", "auto local")])
def test_a_cluster_that_does_not_answer_is_said(name: str, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(*refused.split())
    monkeypatch.setitem(sys.modules, "ray", fake)
    where = "at ray://far:10001" if "far" in name else "on this machine"
    with pytest.raises(EngineError, match=f"no Ray cluster {where}: nobody answers; `ray status`"), load(name):
        pass
    assert fake.calls[-1] == "shutdown"


def test_what_ray_prints_is_no_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    with load("ray"):
        print("(raylet) a worker died")
    print("bundle")
    assert capsys.readouterr() == ("bundle\n", "(raylet) a worker died\n")


def test_ray_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingToolError, match=r"pip install 'vdq-export\[ray\]'"):
        load("ray://far:10001")
