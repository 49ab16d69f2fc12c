"""AnyFlow: Wan's blocks, told where a step ends (r_timestep) as well as where it begins; complex rotary tables."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, text


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text, and the timestep that a step leads to, of each latent frame."""
    return {**text(config, size), "r_timestep": Input((1, size.t), changes=True)}


def _times(config: Config, size: Size) -> torch.Tensor:
    """One for each latent frame, all alike."""
    return torch.ones(1, size.t)


FAMILY = Family(
    name="AnyFlow",
    class_name="AnyFlowTransformer3DModel",
    pipelines=("AnyFlowPipeline",),
    video=(81, 480, 832),
    text_tokens=512,
    layout="TCHW",
    inputs=_inputs,
    times=_times,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
                "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 16,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
