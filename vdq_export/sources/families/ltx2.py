"""LTX-2: video and audio denoised together, each a row of tokens; every block lets them attend to each other."""

from __future__ import annotations

from collections.abc import Callable
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
    text_width,
)
from vdq_export.sources.families.ltx_video import SCHEDULER

FRAME_RATE = 24.0  # frames a second that positions are computed for, the pipeline's default


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    """Text as the pipeline's connectors make it of the encoder's, for video and audio, and the mask of each."""
    wide = bool(config.get("use_prompt_embeddings", True))  # projected within the network; else it has their widths
    widths = (text_width(config),) * 2 if wide else _widths(config)
    return {
        "encoder_hidden_states": Input((1, size.tokens, widths[0])),
        "audio_encoder_hidden_states": Input((1, size.tokens, widths[1])),
        "encoder_attention_mask": mask(size),
        "audio_encoder_attention_mask": mask(size),
    }


def _widths(config: Config) -> tuple[int, int]:
    return int(config["cross_attention_dim"]), int(config["audio_cross_attention_dim"])


def _audio_frames(config: Config, size: Size) -> int:
    """Latents of sound that lasts as long as the video."""
    rate: float = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    return round(size.frames / FRAME_RATE * rate)


def _also(config: Config, size: Size) -> dict[str, tuple[int, ...]]:
    return {"audio_hidden_states": (1, _audio_frames(config, size), int(config["audio_in_channels"]))}


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """Sizes and positions of both rows of tokens, and what the pipeline calls its first network pass with."""
    video, audio = _positions(config, size)
    return {
        "num_frames": size.t, "height": size.h, "width": size.w, "fps": FRAME_RATE,
        "audio_num_frames": _audio_frames(config, size), "video_coords": video, "audio_coords": audio,
        "isolate_modalities": False, "use_cross_timestep": True,
    }  # fmt: skip


def _positions(config: Config, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Begin and end of each token in seconds and pixels, [1, 3, T·H·W, 2] and [1, 1, audio, 2]."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed as Positions

    video = Positions(
        dim=1, patch_size=config["patch_size"], patch_size_t=config["patch_size_t"],
        scale_factors=tuple(config["vae_scale_factors"]), causal_offset=config["causal_offset"], modality="video",
    )  # fmt: skip
    audio = Positions(
        dim=1, patch_size=config["audio_patch_size"], patch_size_t=config["audio_patch_size_t"],
        sampling_rate=config["audio_sampling_rate"], hop_length=config["audio_hop_length"],
        scale_factors=(config["audio_scale_factor"],), causal_offset=config["causal_offset"], modality="audio",
    )  # fmt: skip
    where = torch.device("cpu")
    return (
        video.prepare_video_coords(1, size.t, size.h, size.w, where, fps=FRAME_RATE),
        audio.prepare_audio_coords(1, _audio_frames(config, size), where),
    )


def _forward(
    original: Callable[..., Any],
    hidden_states: torch.Tensor,
    audio_hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    audio_encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    encoder_attention_mask: torch.Tensor | None = None,
    audio_encoder_attention_mask: torch.Tensor | None = None,
    **fixed: Any,
) -> torch.Tensor:
    """Both predictions, one after the other in one row [B, video + audio]; sigma is what the timestep is."""
    predicted = original(
        hidden_states=hidden_states, audio_hidden_states=audio_hidden_states,
        encoder_hidden_states=encoder_hidden_states, audio_encoder_hidden_states=audio_encoder_hidden_states,
        encoder_attention_mask=encoder_attention_mask, audio_encoder_attention_mask=audio_encoder_attention_mask,
        timestep=timestep, sigma=timestep, return_dict=False, **fixed,
    )  # fmt: skip
    return torch.cat([one.flatten(1) for one in predicted], dim=1)


def _prepare(network: torch.nn.Module) -> None:
    network.forward = partial(_forward, network.forward)


_TINY = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48,
    "audio_in_channels": 8, "audio_out_channels": 8, "audio_num_attention_heads": 2, "audio_attention_head_dim": 12,
    "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 32, "pos_embed_max_pos": 20,
}  # fmt: skip

FAMILY = Family(
    name="LTX-2",
    class_name="LTX2VideoTransformer3DModel",
    pipelines=("LTX2Pipeline",),
    video=(121, 512, 768),
    steps=40,
    guidance=4.0,
    text_tokens=1024,
    temporal=8,
    spatial=32,
    layout="tokens",
    sigmas=even_sigmas,
    scheduler=SCHEDULER,
    inputs=_inputs,
    also=_also,
    repeats={"sigma": "timestep"},
    fixed=_fixed,
    prepare=_prepare,
    published=(Published("LTX-2 19B", {}, 18.876e9, 1370),),
    tiny=(Tiny(_TINY, (9, 128, 128)),),
)  # fmt: skip
