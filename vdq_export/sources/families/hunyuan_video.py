"""HunyuanVideo: dual- and single-stream blocks, a token refiner, a masked prompt, pooled text, embedded guidance."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import (
    Config,
    Family,
    Input,
    Published,
    Size,
    Tiny,
    beside_noise,
    even_sigmas,
    seeded,
    text_and_mask,
)

EMBEDDED_GUIDANCE = 6.0  # the pipeline's guidance_scale; the network is told 1000 times that


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text and mask, pooled_projections [1, P], and guidance [1] of networks distilled for it."""
    inputs = text_and_mask(config, size)
    inputs["pooled_projections"] = Input((1, int(config["pooled_projection_dim"])))
    if config.get("guidance_embeds"):
        inputs["guidance"] = Input((1,), torch.float32, 1000 * EMBEDDED_GUIDANCE)
    return inputs


def _beside(config: Config, size: Size) -> torch.Tensor | None:
    """[1, C + 1, T, H, W] of networks that take an image: its latent, and a mask of the first frame."""
    channels = beside_noise(config)
    if not channels:
        return None
    beside = torch.zeros(1, channels, size.t, size.h, size.w)
    beside[:, :-1, 0] = seeded(channels - 1, size.h, size.w)
    beside[:, -1, 0] = 1.0
    return beside


_IMAGE = {"image_condition_type": "latent_concat"}
_TINY = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32, "pooled_projection_dim": 16,
    "rope_axes_dim": (4, 6, 6), "patch_size": 2,
}  # fmt: skip

FAMILY = Family(
    name="HunyuanVideo",
    class_name="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    video=(129, 720, 1280),
    guidance=1.0,  # one branch: guidance is an input
    sigmas=even_sigmas,
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
    inputs=_inputs,
    beside=_beside,
    published=(
        Published("HunyuanVideo", {}, 12.821e9, 547),
        Published("HunyuanVideo I2V", {"in_channels": 33, "guidance_embeds": False, **_IMAGE}, 12.811e9, 545),
    ),
    tiny=(
        Tiny(_TINY, (5, 64, 64)),
        Tiny({**_TINY, "in_channels": 9, "guidance_embeds": False, **_IMAGE}, (5, 64, 64), variant="I2V"),
    ),
)  # fmt: skip
