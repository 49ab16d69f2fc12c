"""Kandinsky 6: Kandinsky 5's blocks, without the sound that they can make beside the video."""

from __future__ import annotations

from vdq_export.sources.families._family import Family, Tiny
from vdq_export.sources.families.kandinsky5 import beside, hidden_states, inputs

FAMILY = Family(
    name="Kandinsky 6 (silent)",
    class_name="Kandinsky6Transformer3DModel",
    pipelines=("Kandinsky6TI2VAPipeline",),
    video=(121, 512, 768),
    text_tokens=512,
    layout="THWC",
    hidden_states=hidden_states,
    beside=beside,
    inputs=inputs,
    tiny=(
        Tiny(
            {
                "in_visual_dim": 4, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4,
                "model_dim": 64, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12),
                "in_audio_dim": 4, "out_audio_dim": 4,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
