"""Cosmos: rotary and learned positions, low-rank modulation; timesteps are logarithms of the noise."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.sources.families._family import Config, Family, Size, Tiny

FPS = 30  # the pipeline's default; positions in time are scaled by it


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Frames a second, and a mask [1, 1, height, width] that says that no pixel is padding.

    Raises ModelError where diffusers lacks what it resizes the mask with.
    """
    if config.get("concat_padding_mask") and find_spec("torchvision") is None:
        raise ModelError("the network resizes its padding mask with torchvision", hint="pip install torchvision")
    return {"fps": FPS, "padding_mask": torch.zeros(1, 1, size.height, size.width)}


def _guided(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Scale 0 is none."""
    return cond + scale * (cond - uncond)


FAMILY = Family(
    name="Cosmos",
    class_name="CosmosTransformer3DModel",
    pipelines=("CosmosTextToWorldPipeline",),
    video=(121, 704, 1280),
    steps=36,
    guidance=7.0,
    text_tokens=512,
    temporal=8,
    scheduler={
        "_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
        "sigma_schedule": "karras", "num_train_timesteps": 1000, "prediction_type": "epsilon", "rho": 7.0,
        "final_sigmas_type": "sigma_min",
    },
    fixed=_fixed,
    guided=_guided,
    tiny=(
        Tiny(
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
                "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 8, "max_size": (4, 16, 16),
                "concat_padding_mask": False,
            },
            (9, 64, 64),
        ),
    ),
)  # fmt: skip
