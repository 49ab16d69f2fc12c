"""MotifVideo: dual- and single-stream blocks, and a decoder of single-stream ones; a masked prompt."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, beside_noise, text_and_mask


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text and mask, and the image's embeddings [1, L', D'] where the network has a projection for them."""
    made = text_and_mask(config, size)
    if config.get("image_embed_dim") is not None:
        made["image_embeds"] = Input((1, _IMAGE_TOKENS, int(config["image_embed_dim"])))
    return made


_IMAGE_TOKENS = 256


def _beside(config: Config, size: Size) -> torch.Tensor:
    """The latent and the mask of an image, of which text to video has none."""
    return torch.zeros(1, beside_noise(config), size.t, size.h, size.w)


FAMILY = Family(
    name="MotifVideo",
    class_name="MotifVideoTransformer3DModel",
    pipelines=("MotifVideoPipeline",),
    video=(121, 736, 1280),
    text_tokens=512,
    inputs=_inputs,
    beside=_beside,
    tiny=(
        Tiny(
            {
                "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
                "num_layers": 1, "num_single_layers": 2, "num_decoder_layers": 1, "text_embed_dim": 32,
                "rope_axes_dim": (4, 6, 6),
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
