"""Wan 2.1 and 2.2: cross-attention to text, rotary embedding by strided assignment; 2.2 has two experts."""

from __future__ import annotations

from vdq_export.sources.families._family import Family, Published, Tiny

_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}

FAMILY = Family(
    name="Wan",
    class_name="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    video=(81, 480, 832),
    text_tokens=512,
    scheduler={
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    published=(
        Published("Wan2.1-T2V-1.3B", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.419e9, 306),
        Published("Wan2.1-T2V-14B", _14B, 14.288e9, 406),
        Published("Wan2.2-I2V-A14B (each expert)", {**_14B, "in_channels": 36}, 14.289e9, 406),
    ),
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32,
                "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 16,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
