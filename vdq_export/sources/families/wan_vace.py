"""Wan VACE: Wan with blocks that run on control latents and add to the others'."""

from __future__ import annotations

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, text


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text, and the control's latents [1, C', T, H, W]."""
    control = Input((1, int(config["vace_in_channels"]), size.t, size.h, size.w))
    return {**text(config, size), "control_hidden_states": control}


FAMILY = Family(
    name="Wan VACE",
    class_name="WanVACETransformer3DModel",
    pipelines=("WanVACEPipeline",),
    video=(81, 480, 832),
    text_tokens=512,
    inputs=_inputs,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4,
                "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 16,
                "vace_layers": [0], "vace_in_channels": 6,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
