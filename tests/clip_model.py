"""The tiny model with a sampler: clips of a few steps, in a second, of inputs that its calibration covers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch

from tests import tiny_model
from vdq_export.graph import Array
from vdq_export.model import Model, Step, first_tensor

STEP = 0.02  # small enough that a clip's error is the sum of its steps' errors


class Sampler:
    """A clip is the latent after TIMESTEPS, each step moving it against the output of both branches."""

    clips = 2
    steps = len(tiny_model.TIMESTEPS)

    def generate(self, denoiser: Any, case: int, observer: Callable[[Step], None] | None = None) -> Array:
        start = tiny_model.inputs(100_000 + case, 0.0)
        latent, prompt = 0.8 * start["hidden_states"], start["encoder_hidden_states"]
        branches: tuple[tuple[Literal["cond", "uncond"], float], ...] = (("cond", 0.8), ("uncond", -0.4))
        for t in tiny_model.TIMESTEPS:
            for branch, scale in branches:
                inputs = {
                    "hidden_states": latent,
                    "timestep": torch.tensor([t]),
                    "encoder_hidden_states": prompt * scale,
                }
                if observer is not None:
                    observer({"t": t, "branch": branch, "inputs": inputs})
                context = denoiser.cache_context(branch) if hasattr(denoiser, "cache_context") else nullcontext()
                with context, torch.no_grad():
                    made = first_tensor(denoiser(**inputs))
                latent = latent - STEP * scale * made
            latent = 0.85 * latent
        picture: Array = np.clip(latent[0].numpy() / 6 + 0.5, 0.0, 1.0)
        return picture

    def settings(self) -> dict[str, Any]:
        return {"name": "tiny", "steps": self.steps}

    def describe(self, case: int) -> str:
        return f"noise {case}"


def build() -> Model:
    return tiny_model.build(sampler=Sampler(), name="tests.clip_model:build")


def other() -> Model:
    """The same with other weights."""
    return tiny_model.build(1, sampler=Sampler(), name="tests.clip_model:other")
