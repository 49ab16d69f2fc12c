"""HunyuanVideo: dual- and single-stream blocks, a token refiner, a masked prompt, pooled text, embedded guidance."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import Config, Family, Input, Published, Size, Tiny, even_sigmas, text_and_mask

EMBEDDED_GUIDANCE = 6.0  # the pipeline's guidance_scale; the network is told 1000 times that


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text and mask, pooled_projections [1, P], and guidance [1] of networks distilled for it."""
    inputs = text_and_mask(config, size)
    inputs["pooled_projections"] = Input((1, int(config["pooled_projection_dim"])))
    if config.get("guidance_embeds"):
        inputs["guidance"] = Input((1,), torch.float32, 1000 * EMBEDDED_GUIDANCE)
    return inputs


FAMILY = Family(
    name="HunyuanVideo",
    class_name="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline",),
    video=(129, 720, 1280),
    guidance=1.0,  # one branch: guidance is an input
    sigmas=even_sigmas,
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0},
    inputs=_inputs,
    published=(Published("HunyuanVideo", {}, 12.821e9, 547),),
    tiny=(
        Tiny(
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
                "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32,
                "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6), "patch_size": 2,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
