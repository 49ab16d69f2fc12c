"""Helios: Wan's blocks on a chunk of frames behind three histories of frames, the older the coarser."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, channels, text

HISTORY = {"long": 16, "mid": 2, "short": 1}  # latent frames, oldest first; short has the video's first one too


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text, and the latents [1, C, T', H, W] of each history."""
    made = text(config, size)
    for name, count in HISTORY.items():
        frames = count + (name == "short")
        made[f"latents_history_{name}"] = Input((1, channels(config), frames, size.h, size.w))
    return made


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Where each frame is in time: the first one, the histories, the chunk."""
    counts = [1, *HISTORY.values(), size.t]
    first, long, mid, short, chunk = torch.split(torch.arange(sum(counts)), counts)
    places = {"latents_history_short": torch.cat([first, short]), "latents_history_mid": mid}
    places |= {"latents_history_long": long, "hidden_states": chunk}
    return {f"indices_{name}": place[None] for name, place in places.items()}


FAMILY = Family(
    name="Helios",
    class_name="HeliosTransformer3DModel",
    pipelines=("HeliosPipeline",),
    video=(33, 384, 640),  # one chunk
    text_tokens=512,
    inputs=_inputs,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
                "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_dim": (8, 8, 8),
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
