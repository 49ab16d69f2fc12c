"""A copy of what gets installed, outside the checkout: setuptools writes build/ beside sources and reads it back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def copy_sources(folder: Path) -> Path:
    """pyproject.toml, README, LICENSE and the package folders into `folder`; returns it."""
    folder.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for place in settings["tool"]["setuptools"]["package-dir"].values():
        shutil.copytree(ROOT / place, folder / place, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def install(wheel_or_folder: Path, target: Path) -> None:
    """Install without dependencies into the plain folder `target`; raises CalledProcessError."""
    pip("install", "--no-deps", "--no-build-isolation", "--no-compile", "--target", target, wheel_or_folder)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)
