"""HunyuanVideo FramePack: HunyuanVideo on a section of frames, behind histories, the older the coarser."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, channels
from vdq_export.sources.families.hunyuan_video import FAMILY as HUNYUAN

HISTORY = {"4x": 16, "2x": 2, "1x": 1}  # latent frames, oldest first; 1x with the first frame is "clean"
_IMAGE_TOKENS = 729  # SigLIP at 384 pixels


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """HunyuanVideo's, the image's embeddings, and the latents [1, C, T', H, W] of each history."""
    made = HUNYUAN.inputs(config, size)
    del made["encoder_attention_mask"]
    made["image_embeds"] = Input((1, _IMAGE_TOKENS, int(config["image_proj_dim"])))
    counts = {"clean": 1 + HISTORY["1x"], "history_2x": HISTORY["2x"], "history_4x": HISTORY["4x"]}
    for name, count in counts.items():
        made[f"latents_{name}"] = Input((1, channels(config), count, size.h, size.w))
    return made


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Where each frame is in time, sections made from first to last: the first frame, the histories, the section.

    And the mask, for the network cuts off masked text, so that it decides on shapes: every token counts.
    """
    counts = [1, *HISTORY.values(), size.t]
    first, coarse, middle, fine, section = torch.split(torch.arange(sum(counts)), counts)
    return {
        "indices_latents": section, "indices_latents_clean": torch.cat([first, fine]),
        "indices_latents_history_2x": middle, "indices_latents_history_4x": coarse,
        "encoder_attention_mask": torch.ones(1, size.tokens, dtype=torch.int64),
    }  # fmt: skip


FAMILY = Family(
    name="HunyuanVideo FramePack",
    class_name="HunyuanVideoFramepackTransformer3DModel",
    pipelines=("HunyuanVideoFramepackPipeline",),
    video=(33, 720, 1280),  # one section
    guidance=1.0,  # one branch: guidance is an input
    inputs=_inputs,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                **HUNYUAN.tiny[0].settings, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
