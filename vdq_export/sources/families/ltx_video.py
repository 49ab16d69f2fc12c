"""LTX-Video: the latent is a row of tokens; norms without gain, RMS norm across heads, a mask over the prompt."""

from __future__ import annotations

from typing import Any

from vdq_export.sources.families._family import Config, Family, Published, Size, Tiny, even_sigmas, text_and_mask

FRAME_RATE = 25.0  # frames a second that the rotary embedding is scaled for, the pipeline's default


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """The grid that the row of tokens is, and what one step on it stands for: seconds, pixels, pixels."""
    scale = (size.temporal / FRAME_RATE, size.spatial, size.spatial)
    return {"num_frames": size.t, "height": size.h, "width": size.w, "rope_interpolation_scale": scale}


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1,
}  # fmt: skip

FAMILY = Family(
    name="LTX-Video",
    class_name="LTXVideoTransformer3DModel",
    pipelines=("LTXPipeline",),
    video=(161, 512, 704),
    guidance=3.0,
    text_tokens=128,
    temporal=8,
    spatial=32,
    layout="tokens",
    sigmas=even_sigmas,
    scheduler=SCHEDULER,
    inputs=text_and_mask,
    fixed=_fixed,
    published=(
        Published("LTX-Video 2B", {}, 1.923e9, 287),
        Published(
            "LTX-Video 13B (0.9.7)",
            {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
            13.043e9,
            487,
        ),
    ),
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 8, "out_channels": 8,
                "cross_attention_dim": 48, "num_layers": 2, "caption_channels": 32,
            },
            (9, 128, 128),
        ),
    ),
)  # fmt: skip
