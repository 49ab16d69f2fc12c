"""Wan Animate: Wan, told how a body (pose latents) and a face (pixels) move; a reference frame comes first."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import (
    Config,
    Family,
    Input,
    Size,
    Tiny,
    beside_noise,
    seeded,
    text,
)

_IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224 pixels


def _frames(config: Config, frames: int) -> int:
    """The reference is a latent frame of its own."""
    return frames + 1


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text, the reference's embeddings, pose latents [1, C', T, H, W], and the face [1, 3, frames, S, S] in pixels."""
    side = int(config["motion_encoder_size"])
    return {
        **text(config, size),
        "encoder_hidden_states_image": Input((1, _IMAGE_TOKENS, int(config["image_dim"]))),
        "pose_hidden_states": Input((1, int(config["latent_channels"]), size.t, size.h, size.w)),
        "face_pixel_values": Input((1, 3, size.frames, side, side)),
    }


def _beside(config: Config, size: Size) -> torch.Tensor:
    """A mask of the frames that are given, and their latents."""
    return seeded(1, beside_noise(config), size.t + 1, size.h, size.w)


FAMILY = Family(
    name="Wan Animate",
    class_name="WanAnimateTransformer3DModel",
    pipelines=("WanAnimatePipeline",),
    video=(77, 720, 1280),
    steps=20,
    guidance=1.0,
    text_tokens=512,
    frames=_frames,
    inputs=_inputs,
    beside=_beside,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 12, "latent_channels": 4,
                "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 96, "num_layers": 2,
                "rope_max_seq_len": 16, "image_dim": 16, "added_kv_proj_dim": 48, "motion_encoder_size": 16,
                "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_style_dim": 8, "motion_dim": 4,
                "motion_encoder_dim": 8, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
                "inject_face_latents_blocks": 2,
            },
            (5, 64, 64),
            tokens=512,  # the network tells image from text by their being 512
        ),
    ),
)  # fmt: skip
