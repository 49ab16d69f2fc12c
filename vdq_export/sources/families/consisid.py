"""ConsisID: CogVideoX with cross-attention to what a face extractor makes of an image."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, beside_noise, seeded, text
from vdq_export.sources.families.cogvideox import rotary_tables

_VIT_TOKENS = 577  # of the face's vision transformer, at each of LFE_num_scale depths


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text; for faces id_cond [1, D'] and id_vit_hidden [scales, 1, L', D''], the pipeline's list stacked."""
    made = text(config, size)
    if config.get("is_train_face"):
        made["id_cond"] = Input((1, int(config["LFE_id_dim"])))
        made["id_vit_hidden"] = Input((int(config["LFE_num_scale"]), 1, _VIT_TOKENS, int(config["LFE_vit_dim"])))
    return made


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """The rotary tables, where the network takes some."""
    if not config.get("use_rotary_positional_embeddings"):
        return {}
    patch = int(config["patch_size"])
    return {"image_rotary_emb": rotary_tables(config, size.t, size.h // patch, size.w // patch)}


def _beside(config: Config, size: Size) -> torch.Tensor | None:
    """The image's latent, where the network takes one."""
    count = beside_noise(config)
    return seeded(1, size.t, count, size.h, size.w) if count else None


FAMILY = Family(
    name="ConsisID",
    class_name="ConsisIDTransformer3DModel",
    pipelines=("ConsisIDPipeline",),
    video=(49, 480, 720),
    guidance=6.0,
    text_tokens=226,
    layout="TCHW",
    integer_time=True,
    inputs=_inputs,
    fixed=_fixed,
    beside=_beside,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
                "time_embed_dim": 16, "text_embed_dim": 32, "num_layers": 2, "sample_width": 8, "sample_height": 8,
                "sample_frames": 9, "max_text_seq_length": 8, "is_train_face": True, "cross_attn_interval": 1,
                "cross_attn_dim_head": 16, "cross_attn_num_heads": 2, "LFE_id_dim": 12, "LFE_vit_dim": 16,
                "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 4,
                "LFE_output_dim": 32, "LFE_ff_mult": 2, "LFE_num_scale": 5,
            },
            (9, 64, 64),
        ),
    ),
)  # fmt: skip
