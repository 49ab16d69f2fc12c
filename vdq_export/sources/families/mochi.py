"""Mochi: joint attention of two widths, learned rotary frequencies. It takes masked tokens out."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Size, Tiny


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """The mask decides on shapes, so it is given once: every token counts."""
    return {"encoder_attention_mask": torch.ones(1, size.tokens, dtype=torch.int64)}


FAMILY = Family(
    name="Mochi",
    class_name="MochiTransformer3DModel",
    pipelines=("MochiPipeline",),
    video=(85, 480, 848),
    steps=64,
    guidance=4.5,
    temporal=6,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4,
                "pooled_projection_dim": 16, "text_embed_dim": 32, "time_embed_dim": 16, "max_sequence_length": 8,
            },
            (7, 64, 64),
        ),
    ),
)  # fmt: skip
