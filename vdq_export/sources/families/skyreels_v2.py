"""SkyReels-V2: Wan's blocks under another name, complex rotary tables."""

from __future__ import annotations

from vdq_export.sources.families._family import Family, Published, Tiny

FAMILY = Family(
    name="SkyReelsV2",
    class_name="SkyReelsV2Transformer3DModel",
    pipelines=("SkyReelsV2Pipeline",),
    video=(97, 544, 960),
    guidance=6.0,
    text_tokens=512,
    scheduler={
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 8.0,
    },
    published=(
        Published(
            "SkyReels-V2-T2V-14B", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14.288e9, 406
        ),
    ),
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32,
                "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 16,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
