"""Folders as diffusers' save_pretrained() writes them, with tiny random models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from tests.families import FAMILIES
from vdq_export.sources.registry import of

SMALL = {"Wan": (5, 64, 64), "CogVideoX": (9, 64, 64), "LTX-Video": (9, 128, 128)}  # family -> frames, height, width


def network(family: str) -> Any:
    """The family's tiny network, without arguments fixed by the test's model."""
    module = FAMILIES[family]().module
    module.__dict__.pop("forward", None)
    return module


def transformer(family: str, folder: Path, **saving: Any) -> Path:
    """A transformer folder."""
    network(family).save_pretrained(folder, **saving)
    return folder


def pipeline(family: str, folder: Path, *, experts: int = 1, scheduler: Any = None, **more: Any) -> Path:
    """A pipeline folder of transformer(s) and scheduler; more: entries of its index."""
    module = network(family)
    names = ("transformer", "transformer_2")[:experts]
    for number, name in enumerate(names):
        with torch.no_grad():  # two experts of one configuration and different weights
            next(module.parameters()).add_(0.1 * number)
        module.save_pretrained(folder / name)
    if scheduler is None:
        settings = dict(of(type(module).__name__).scheduler or {})
        scheduler = getattr(diffusers, settings.pop("_class_name"))(**settings)
    scheduler.save_pretrained(folder / "scheduler")
    parts = {name: ["diffusers", type(module).__name__] for name in names}
    index = {"_class_name": "Pipeline", **parts, "scheduler": ["diffusers", type(scheduler).__name__], **more}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def sizes(family: str, steps: int = 4) -> Sequence[str]:
    """Options of a small video."""
    frames, height, width = SMALL[family]
    return ["--frames", f"{frames}", "--height", f"{height}", "--width", f"{width}", "--steps", f"{steps}"]


def spec(folder: Path, family: str = "Wan", steps: int = 4, **more: object) -> str:
    """The same as a MODEL argument."""
    frames, height, width = SMALL[family]
    chosen = {"frames": frames, "height": height, "width": width, "steps": steps, **more}
    return f"{folder}?" + "&".join(f"{name}={value}" for name, value in chosen.items())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def wan_with(folder: Path, **settings: Any) -> Path:
    """A Wan of other settings."""
    known = {k: v for k, v in network("Wan").config.items() if not k.startswith("_")}
    diffusers.WanTransformer3DModel(**known | settings).save_pretrained(folder)
    return folder
