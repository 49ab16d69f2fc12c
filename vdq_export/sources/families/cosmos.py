"""Cosmos: rotary and learned positions, low-rank modulation."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Size, Tiny


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """No pixel is padding."""
    return {"padding_mask": torch.zeros(1, 1, size.h, size.w)} if config.get("concat_padding_mask") else {}


FAMILY = Family(
    name="Cosmos",
    class_name="CosmosTransformer3DModel",
    pipelines=("CosmosTextToWorldPipeline",),
    video=(121, 704, 1280),
    steps=36,
    guidance=7.0,
    text_tokens=512,
    temporal=8,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
                "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 8, "max_size": (4, 16, 16),
                "concat_padding_mask": False,
            },
            (9, 64, 64),
        ),
    ),
)  # fmt: skip
