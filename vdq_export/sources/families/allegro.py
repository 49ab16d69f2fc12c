"""Allegro: rotary embedding of three axes by tables from outside, cross-attention to a masked prompt."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Input, Published, Size, Tiny, text_and_mask


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text [B, 1, L, D] and its mask [B, L], as the pipeline gives them."""
    made = text_and_mask(config, size)
    batch, tokens, width = made["encoder_hidden_states"].shape
    return {**made, "encoder_hidden_states": Input((batch, 1, tokens, width))}


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Tables of frequencies, ((cos, sin) of each axis), and each token's position on the axes, as the pipeline's."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    patch = int(config["patch_size"])
    grid = size.h // patch, size.w // patch
    made: Any = get_3d_rotary_pos_embed_allegro(  # diffusers declares fewer results than there are
        embed_dim=config["attention_head_dim"],
        crops_coords=((0, 0), grid),
        grid_size=grid,
        temporal_size=size.t,
        interpolation_scale=tuple(config[f"interpolation_scale_{axis}"] for axis in "thw"),
    )
    *tables, t, h, w = made
    positions = torch.cartesian_prod(*(axis.to(torch.long) for axis in (t, h, w)))  # [tokens, 3]
    return {"image_rotary_emb": (tuple(tables), tuple(positions.T.reshape(3, 1, -1).contiguous()))}


FAMILY = Family(
    name="Allegro",
    class_name="AllegroTransformer3DModel",
    pipelines=("AllegroPipeline",),
    video=(88, 720, 1280),
    steps=100,
    guidance=7.5,
    text_tokens=512,
    first_alone=False,
    integer_time=True,
    scheduler={
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.0001, "beta_end": 0.02,
        "beta_schedule": "linear",
    },
    inputs=_inputs,
    fixed=_fixed,
    published=(Published("Allegro", {}, 2.772e9, 326),),
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "in_channels": 4,
                "out_channels": 4, "cross_attention_dim": 48, "sample_height": 8, "sample_width": 8, "sample_frames": 2,
                "caption_channels": 32,
            },
            (8, 64, 64),
        ),
    ),
)  # fmt: skip
