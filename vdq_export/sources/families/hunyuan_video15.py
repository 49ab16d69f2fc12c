"""HunyuanVideo 1.5: dual-stream blocks; text of two encoders, each with its mask, and an image's tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from vdq_export.sources.families._family import (
    Config,
    Family,
    Input,
    Published,
    Size,
    Tiny,
    even_sigmas,
    mask,
    text_and_mask,
)

SECOND_TOKENS = 256  # of ByT5, whatever the first encoder's number
IMAGE_TOKENS = 729  # of the image encoder


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text [B, L, D] and mask of Qwen and of ByT5; image_embeds [B, 729, E] of image-to-video networks."""
    second = min(SECOND_TOKENS, size.tokens)
    inputs = text_and_mask(config, size)
    inputs["encoder_hidden_states_2"] = Input((1, second, int(config["text_embed_2_dim"])))
    inputs["encoder_attention_mask_2"] = mask(size, second)
    if not _text_only(config):
        inputs["image_embeds"] = Input((1, IMAGE_TOKENS, int(config["image_embed_dim"])))
    return inputs


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Text-to-video pipelines give an image of zeros, whose tokens are all masked."""
    if not _text_only(config):
        return {}
    return {"image_embeds": torch.zeros(1, IMAGE_TOKENS, int(config["image_embed_dim"]))}


def _text_only(config: Config) -> bool:
    return config.get("task_type") == "t2v"


def _beside(config: Config, size: Size) -> torch.Tensor:
    """[1, C + 1, T, H, W]: the image's latent and where it is; of text-to-video zeros, else the first frame."""
    channels = int(config["in_channels"]) - int(config["out_channels"])
    beside = torch.zeros(1, channels, size.t, size.h, size.w)
    if not _text_only(config):
        beside[:, :-1, 0] = torch.randn(channels - 1, size.h, size.w, generator=torch.Generator().manual_seed(0))
        beside[:, -1, 0] = 1.0
    return beside


def _forward(
    network: Any,
    text_only: bool,
    hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    encoder_hidden_states_2: torch.Tensor,
    encoder_attention_mask_2: torch.Tensor,
    image_embeds: torch.Tensor,
    timestep_r: torch.Tensor | None = None,
) -> torch.Tensor:
    """The network's forward with every text token in its place, masked ones excluded as keys.

    diffusers' own sorts the tokens that count to the front, so that its shapes depend on the masks. Their order is of
    no consequence: text has no positions, and what the blocks make of it is not returned. An image of zeros is
    excluded as diffusers does it; of a text-to-video network its tokens are not even computed.
    """
    tables = network.rope(hidden_states)
    temb = network.time_embed(timestep, timestep_r=timestep_r)
    embedded = network.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask)
    words = [_typed(network, network.context_embedder_2(encoder_hidden_states_2), 1), _typed(network, embedded, 0)]
    masks = [encoder_attention_mask_2, encoder_attention_mask]
    if not text_only:
        shown = (image_embeds != 0).any().expand(image_embeds.shape[:2])
        words.insert(0, _typed(network, network.image_embedder(image_embeds), 2))
        masks.insert(0, shown)
    kept = torch.cat([one.bool() for one in masks], dim=1)
    video, said = network.x_embedder(hidden_states), torch.cat(words, dim=1) * kept[..., None].to(embedded.dtype)
    for block in network.transformer_blocks:
        video, said = block(video, said, temb, kept, tables)
    return _unpatched(network, network.proj_out(network.norm_out(video, temb)), hidden_states)


def _typed(network: Any, tokens: torch.Tensor, kind: int) -> torch.Tensor:
    """Tokens [B, L, D] with the embedding of their kind."""
    made: torch.Tensor = tokens + network.cond_type_embed(torch.full(tokens.shape[:2], kind))
    return made


def _unpatched(network: Any, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, tokens, C·p_t·p·p] -> [B, C, T, H, W] of the size of `like`."""
    p_t, p = network.config.patch_size_t, network.config.patch_size
    (t, h, w), batch = like.shape[2:], like.shape[0]
    grid = tokens.reshape(batch, t // p_t, h // p, w // p, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return grid.reshape(batch, -1, t, h, w)


def _prepare(network: torch.nn.Module) -> None:
    config: Any = network.config
    network.forward = partial(_forward, network, _text_only(config))


_TINY = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 32, "text_embed_2_dim": 24, "image_embed_dim": 20,
    "rope_axes_dim": (4, 6, 6), "task_type": "t2v",
}  # fmt: skip

FAMILY = Family(
    name="HunyuanVideo-1.5",
    class_name="HunyuanVideo15Transformer3DModel",
    pipelines=("HunyuanVideo15Pipeline",),
    video=(121, 480, 848),
    guidance=6.0,
    text_tokens=1000,
    spatial=16,
    sigmas=even_sigmas,
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0},
    inputs=_inputs,
    fixed=_fixed,
    beside=_beside,
    prepare=_prepare,
    published=(
        Published("HunyuanVideo-1.5-480p T2V", {"task_type": "t2v"}, 8.327e9, 784),
        Published("HunyuanVideo-1.5-480p I2V", {"task_type": "i2v"}, 8.327e9, 784),
    ),
    tiny=(Tiny(_TINY, (5, 64, 64)), Tiny({**_TINY, "task_type": "i2v"}, (5, 64, 64), variant="image")),
)  # fmt: skip
