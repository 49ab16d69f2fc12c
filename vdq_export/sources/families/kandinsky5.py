"""Kandinsky 5: channels last, text blocks of their own, cross-attention to their result."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, channels, text


def hidden_states(config: Config, size: Size) -> tuple[int, ...]:
    """[1, T, H, W, C], behind the noise the latent and the mask of an image where the network takes them."""
    count = channels(config)
    return (1, size.t, size.h, size.w, 2 * count + 1 if config.get("visual_cond") else count)


def beside(config: Config, size: Size) -> torch.Tensor | None:
    """Of text to video: no image."""
    if not config.get("visual_cond"):
        return None
    return torch.zeros(1, size.t, size.h, size.w, channels(config) + 1)


def inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text of one encoder, pooled text [1, P] of another."""
    return {**text(config, size), "pooled_projections": Input((1, int(config["in_text_dim2"])))}


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Positions of patches and text, and what positions are divided by, as the pipeline chooses it."""
    patch = config["patch_size"]
    sides = (size.t // patch[0], size.h // patch[1], size.w // patch[2])
    small = all(480 <= side <= 854 for side in (size.height, size.width))
    return {
        "visual_rope_pos": [torch.arange(side) for side in sides],
        "text_rope_pos": torch.arange(size.tokens),
        "scale_factor": (1.0, 2.0, 2.0) if small else (1.0, 3.16, 3.16),
    }


FAMILY = Family(
    name="Kandinsky 5",
    class_name="Kandinsky5Transformer3DModel",
    pipelines=("Kandinsky5T2VPipeline",),
    video=(121, 512, 768),
    text_tokens=512,
    layout="THWC",
    hidden_states=hidden_states,
    beside=beside,
    inputs=inputs,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                "in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4,
                "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
                "visual_cond": True,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
