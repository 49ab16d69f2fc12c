"""MiniMax-H3: text, video and audio in one row of tokens; each row is told its modality, timestep and place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Size, Tiny, channels

AUDIO_RATE = 25.0  # audio tokens a second
_FRAME_RATE = 24.0
HORIZON = 1000.0  # a timestep between 0 and this is given


def _grid(config: Config, size: Size) -> tuple[int, int, int]:
    patch = config["patch_size"]
    return size.t // patch[0], size.h // patch[1], size.w // patch[2]


def _audio(size: Size) -> int:
    return max(1, round(size.frames / _FRAME_RATE * AUDIO_RATE))


def _hidden_states(config: Config, size: Size) -> tuple[int, ...]:
    return (1, prod(_grid(config, size)), channels(config) * prod(config["patch_size"]))


def _also(config: Config, size: Size) -> dict[str, tuple[int, ...]]:
    """The audio's noise, which becomes less as the video's does."""
    return {"audio_hidden_states": (1, _audio(size), int(config["audio_in_channels"]))}


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """The row: text at timestep 0, video, audio; places (t, h, w), where text and audio go along t alone."""
    counts = (size.tokens, prod(_grid(config, size)), _audio(size))
    words, patches, sounds = torch.split(torch.arange(sum(counts)), list(counts))
    alone = [torch.stack([torch.arange(n), torch.zeros(n).long(), torch.zeros(n).long()], 1) for n in counts]
    video = torch.cartesian_prod(*(torch.arange(side) for side in _grid(config, size)))
    return {
        "timestep_indices": torch.arange(3).repeat_interleave(torch.tensor(counts)),
        "token_tags": torch.tensor([1, 0, 2]).repeat_interleave(torch.tensor(counts)),
        "position_ids": torch.cat([alone[0], video, alone[2]]),
        "text_indices": words, "video_indices": patches, "audio_indices": sounds,
    }  # fmt: skip


def _forward(original: Callable[..., Any], *, timestep: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Both predictions, one after the other in one row [B, video + audio].

    The network wants the distinct timesteps between 0 and 1, of text, video and audio; timestep [1] is of the last two.
    """
    times = torch.cat([0 * timestep, timestep, timestep]) / HORIZON
    predicted = original(**{**inputs, "timestep": times, "return_dict": False})
    return torch.cat([one.flatten(1) for one in predicted], dim=1)


def _prepare(network: torch.nn.Module) -> None:
    network.forward = partial(_forward, network.forward)


FAMILY = Family(
    name="MiniMax-H3",
    class_name="MiniMaxH3Transformer3DModel",
    pipelines=("MiniMaxH3ModularPipeline",),
    layout="tokens",
    hidden_states=_hidden_states,
    also=_also,
    fixed=_fixed,
    prepare=_prepare,
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "hidden_size": 48, "num_layers": 2,
                "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4, "audio_in_channels": 6, "text_dim": 32,
                "freq_dim": 16, "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 4,
            },
            (5, 64, 64),
        ),
    ),
)  # fmt: skip
