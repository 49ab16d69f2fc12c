"""Latte: spatial and temporal blocks in turn; frames, then patches, are the batch."""

from __future__ import annotations

from typing import Any

from vdq_export.sources.families._family import Config, Family, Published, Size, Tiny

_COMMON = {
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "attention_bias": True, "activation_fn": "gelu-approximate",
    "norm_eps": 1e-6, "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000,
}  # fmt: skip


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Without temporal attention it would make pictures."""
    return {"enable_temporal_attentions": True}


FAMILY = Family(
    name="Latte",
    class_name="LatteTransformer3DModel",
    pipelines=("LattePipeline",),
    video=(16, 512, 512),
    guidance=7.5,
    text_tokens=120,
    temporal=1,
    integer_time=True,
    scheduler={
        "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
        "clip_sample": False,
    },
    fixed=_fixed,
    published=(
        Published(
            "Latte-1 T2V",
            {
                **_COMMON, "num_layers": 28, "attention_head_dim": 72, "cross_attention_dim": 1152,
                "caption_channels": 4096,
            },
            1.057e9,
            454,
        ),
    ),
    tiny=(
        Tiny(
            {
                **_COMMON, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 24,
                "cross_attention_dim": 48, "sample_size": 8, "caption_channels": 32, "video_length": 4,
            },
            (4, 64, 64),
        ),
    ),
)  # fmt: skip
