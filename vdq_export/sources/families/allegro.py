"""Allegro: rotary embedding of three axes computed from positions, cross-attention to a masked prompt."""

from __future__ import annotations

from vdq_export.sources.families._family import Family, Tiny, text_and_mask

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
    inputs=text_and_mask,
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
