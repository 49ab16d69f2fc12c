"""Cosmos: rotary and learned positions, low-rank modulation; timesteps are logarithms of the noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Published, Size, Tiny

FPS = 30  # the pipeline's default; positions in time are scaled by it


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Frames a second, and a mask [1, 1, height, width] that says that no pixel is padding."""
    return {"fps": FPS, "padding_mask": torch.zeros(1, 1, size.height, size.width)}


def _prepare(network: torch.nn.Module) -> None:
    """The channel of the padding mask, resized to the latent's, is zero: diffusers would resize it with torchvision."""
    config: Any = network.config
    if config.concat_padding_mask:
        network.register_to_config(concat_padding_mask=False)  # type: ignore[operator]
        network.forward = partial(_unpadded, network.forward)


def _unpadded(forward: Callable[..., Any], hidden_states: torch.Tensor, **others: Any) -> Any:
    """`forward` of [B, C, T, H, W] with a channel of zeros behind the others."""
    return forward(torch.cat([hidden_states, torch.zeros_like(hidden_states[:, :1])], dim=1), **others)


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
    prepare=_prepare,
    guided=_guided,
    published=(Published("Cosmos-1.0-Diffusion-7B-Text2World", {}, 7.236e9, 454),),
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
