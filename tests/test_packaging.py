"""The package works without the repository: what the wheel holds, and the command run from it somewhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.staging import ROOT, copy_sources, install, pip

FOLDERS = ("vdq_export", "passes", "calib", "targets", "samples")
KINDS = (".py", ".toml", ".json", ".safetensors", ".mjs", ".js", ".html", ".css")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = copy_sources(folder / "sources")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install(wheel, target)
    return target


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """python … with the installed copy in front of whatever else is importable; returns stdout."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_source_file_and_all_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    missing = []
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in KINDS or path.name == "checkpoint.safetensors":
                continue
            inside = path.relative_to(ROOT).as_posix()
            missing += [] if {inside, f"vdq_export/{inside}"} & names else [inside]
    assert missing == []
    assert {n for n in names if n.startswith("vdq_export/recipes/") and n.endswith(".toml")}
    assert {n for n in names if n.startswith("vdq_export/schemas/") and n.endswith(".json")}
    assert "vdq_export/samples/digits/weights.safetensors" in names
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"vdq_export"}, "nothing else is installed"
    assert not any("checkpoint" in n and n.endswith(".safetensors") for n in names)


def test_wheel_has_its_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "vdq-export = vdq_export.cli:main" in archive.read(entry).decode()
        assert any(n.endswith("licenses/LICENSE") for n in names)
    assert wheel.stat().st_size < 20e6


def test_installed_copy_works_without_the_repository(installed: Path, tmp_path: Path) -> None:
    """Every module imports from the installed copy, and names, recipes, targets and the sample are found there."""
    script = (
        "import importlib, json, pkgutil, vdq_export\n"
        "names = [m.name for m in pkgutil.walk_packages(vdq_export.__path__, 'vdq_export.')]\n"
        "skipped = ('__main__', '.train', '.train_judge')\n"
        "files = {n: importlib.import_module(n).__file__ for n in names if not n.endswith(skipped)}\n"
        "from vdq_export import recipe, schemas, targets\n"
        "from vdq_export.samples import digits\n"
        "model = digits.load('digits')\n"
        "size = sum(p.numel() for p in model.module.parameters())\n"
        "print(json.dumps([files, recipe.names(), sorted(targets.catalogue()), size]))\n"
    )
    files, recipes, targets, size = json.loads(run(installed, tmp_path, "-c", script))
    assert {n: f for n, f in files.items() if not Path(f).is_relative_to(installed)} == {}
    assert len(files) > 50
    assert {n.split(".")[1] for n in files} >= {"passes", "calib", "targets", "samples", "commands", "sources"}
    assert "static-asq" in recipes
    assert "ort-int8" in targets
    assert size > 1_000_000


def test_command_runs_from_the_installed_copy(installed: Path, tmp_path: Path) -> None:
    listed = json.loads(run(installed, tmp_path, "-m", "vdq_export.cli", "recipes", "--json"))
    shipped = {path.stem for path in (ROOT / "vdq_export" / "recipes").glob("*.toml")}
    assert {one["name"] for one in listed} == shipped
