"""Refuses files of weights: pickled ones run code when loaded, and none says what network they belong to."""

from __future__ import annotations

from pathlib import Path

from vdq_export.errors import ModelError
from vdq_export.model import Model

ACCEPTS = ""  # it accepts nothing: it refuses
_PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
_HOW = "build the network in your own code, load the weights there, and give package.module:factory"


def accepts(spec: str) -> bool:
    path = Path(spec)
    return path.suffix.lower() in (*_PICKLED, ".safetensors") or (path.is_dir() and bool(_pickles(path)))


def load(spec: str) -> Model:
    path = Path(spec)
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"{spec} holds weights, and does not say of what network", hint=_HOW)
    named = ", ".join(_pickles(path)) if path.is_dir() else path.name
    raise ModelError(
        f"{spec}: {named} is a pickled checkpoint, which can run code when it is loaded, and is refused",
        hint=f"convert it to .safetensors; then {_HOW}" if path.is_file() else "convert the weights to .safetensors",
    )


def _pickles(folder: Path) -> list[str]:
    """Pickled checkpoints in a folder that has no safetensors beside them."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLED)
