"""Files and folders: refuses pickled checkpoints, which run code when loaded, and says what is accepted instead."""

from __future__ import annotations

from pathlib import Path

from vdq_export.errors import ModelError
from vdq_export.model import Model

ACCEPTS = "(never a pickled checkpoint)"
_PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def accepts(spec: str) -> bool:
    path = Path(spec)
    return path.suffix.lower() in _PICKLED or (path.is_dir() and bool(_pickles(path)))


def load(spec: str) -> Model:
    path = Path(spec)
    named = ", ".join(_pickles(path)) if path.is_dir() else path.name
    raise ModelError(
        f"{spec}: {named} is a pickled checkpoint, which can run code when it is loaded, and is refused",
        hint="convert the weights to .safetensors",
    )


def _pickles(folder: Path) -> list[str]:
    """Pickled checkpoints in a folder that has no safetensors beside them."""
    if any(folder.glob("*.safetensors")):
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _PICKLED)
