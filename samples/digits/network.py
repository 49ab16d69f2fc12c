"""The sample's network: diffusers' WanTransformer3DModel, small, over pixels instead of VAE latents."""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.samples.digits.data import TEXT_DIM

CONFIG: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": TEXT_DIM,
    "freq_dim": 128,
    "ffn_dim": 576,
    "num_layers": 6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def build(seed: int | None = None) -> torch.nn.Module:
    """The float network in eval mode, randomly initialised; `seed` fixes the initial weights."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    if seed is not None:
        torch.manual_seed(seed)
    network: torch.nn.Module = WanTransformer3DModel(**CONFIG).eval()
    return network
