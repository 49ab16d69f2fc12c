"""Wan 2.1 and 2.2: cross-attention to text (2.1 I2V: and to an image), rotary embedding by strided assignment.

2.2-A14B has two experts of one configuration; 2.2-5B gives each token a timestep (expand_timesteps of its pipeline).
"""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.sources.families._family import (
    Config,
    Family,
    Input,
    Published,
    Size,
    Tiny,
    beside_noise,
    seeded,
    text,
)  # fmt: skip

IMAGE_TOKENS = 257  # CLIP ViT-H/14 at 224 pixels


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text, and the image's embeddings [1, L', D'] where the network has projections for them."""
    made = text(config, size)
    if config.get("image_dim") is not None:
        tokens = config.get("pos_embed_seq_len") or IMAGE_TOKENS  # with first and last frame: twice as many
        made["encoder_hidden_states_image"] = Input((1, int(tokens), int(config["image_dim"])))
    return made


def _beside(config: Config, size: Size) -> torch.Tensor | None:
    """Of image to video: a mask of the known frames, then the latent of the video that has only these; of the 5B the
    latent of the first frame.

    Raises ModelError for channels beside the noise that are not these.
    """
    if _starts_with_image(config):
        return seeded(1, int(config["in_channels"]), 1, size.h, size.w)
    if not (channels := beside_noise(config)):
        return None
    mask = channels - int(config["out_channels"])
    if mask != size.temporal:
        raise ModelError(
            f"the network takes {config['in_channels']} channels and returns {config['out_channels']}: it is "
            "conditioned on more than text and an image",
            hint="record trajectories in its pipeline, write a factory, and give package.module:factory",
        )
    known = torch.zeros(1, mask, size.t, size.h, size.w)
    known[:, :, 0] = 1
    return torch.cat([known, seeded(1, channels - mask, size.t, size.h, size.w)], dim=1)


def _times(config: Config, size: Size) -> torch.Tensor | None:
    """t for each token of the 5B, 0 for those of a first frame that is given."""
    if not config.get("expand_timesteps"):
        return None
    patch: Any = config["patch_size"]
    weights = torch.ones(size.t, -(-size.h // patch[1]), -(-size.w // patch[2]))
    if _starts_with_image(config):
        weights[0] = 0
    return weights.reshape(1, -1)


def _starts_with_image(config: Config) -> bool:
    return bool(config.get("expand_timesteps")) and config.get("pipeline") == "WanImageToVideoPipeline"


_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_TINY = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 16,
}  # fmt: skip

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
    inputs=_inputs,
    beside=_beside,
    times=_times,
    published=(
        Published("Wan2.1-T2V-1.3B", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.419e9, 306),
        Published("Wan2.1-T2V-14B", _14B, 14.288e9, 406),
        Published(
            "Wan2.1-I2V-14B", {**_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16.395e9, 488
        ),
        Published("Wan2.2-T2V-A14B (each expert)", _14B, 14.288e9, 406),
        Published("Wan2.2-I2V-A14B (each expert)", {**_14B, "in_channels": 36}, 14.289e9, 406),
        Published(
            "Wan2.2-TI2V-5B",
            {
                "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48,
            },
            5.000e9,
            306,
        ),
    ),
    tiny=(
        Tiny(_TINY, (5, 64, 64)),
        Tiny(
            {**_TINY, "in_channels": 12, "image_dim": 40, "added_kv_proj_dim": 48}, (5, 64, 64), variant="I2V",
            tokens=512,  # its attention takes what is beyond the last 512 for the image's
        ),
        Tiny({**_TINY, "in_channels": 12}, (5, 64, 64), variant="2.2-I2V"),
    ),
)  # fmt: skip
