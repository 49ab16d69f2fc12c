"""Pipelines whose networks attend jointly to text and video: HunyuanVideo, Mochi, LTX. See tests/pipelines.py.

Prompts are padded: the last tokens are masked, differently for both guidance branches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from tests.pipelines import Case


def _mask(kept: int, tokens: int = 8) -> torch.Tensor:
    return (torch.arange(tokens)[None] < kept).to(torch.int64)


def _noise(*arguments: Any) -> torch.Tensor:
    """Normal numbers of the shape that the arguments begin with; the generator is the last."""
    *shape, generator = arguments
    return torch.randn(shape, generator=generator)


_MASKS = {"prompt_attention_mask": _mask(6), "negative_prompt_attention_mask": _mask(2)}


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def _hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )


def _hunyuan15_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    )


def _mochi_vae() -> Any:
    return diffusers.AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=None, latents_std=None,
    )  # fmt: skip


def _ltx_vae() -> Any:
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip


_LTX_SHIFT = {
    "use_dynamic_shifting": True, "base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95,
    "max_shift": 2.05, "shift_terminal": 0.1,
}  # fmt: skip


def _guider() -> Any:
    return diffusers.ClassifierFreeGuidance(guidance_scale=2.0)


_ONE_BRANCH = {"guidance_scale": 6.0, "pooled_prompt_embeds": partial(_noise, 1, 16), **_MASKS}
CASES = {
    case.name: case
    for case in (
        Case("HunyuanVideo", "HunyuanVideo", "HunyuanVideoPipeline", _hunyuan_vae, partial(_flow, shift=7.0),
             call=_ONE_BRANCH, guidance=1.0),
        Case("HunyuanVideo, true guidance", "HunyuanVideo", "HunyuanVideoPipeline", _hunyuan_vae,
             partial(_flow, shift=7.0),
             call={**_ONE_BRANCH, "true_cfg_scale": 2.0, "negative_pooled_prompt_embeds": partial(_noise, 1, 16)}),
        Case("HunyuanVideo 1.5", "HunyuanVideo-1.5", "HunyuanVideo15Pipeline", _hunyuan15_vae,
             partial(_flow, shift=5.0), parts={"guider": _guider},
             call={"prompt_embeds_mask": _mask(6), "negative_prompt_embeds_mask": _mask(2),
                   "prompt_embeds_2": partial(_noise, 1, 8, 24), "negative_prompt_embeds_2": partial(_noise, 1, 8, 24),
                   "prompt_embeds_mask_2": _mask(3), "negative_prompt_embeds_mask_2": _mask(1)}),
        Case("Mochi", "Mochi", "MochiPipeline", _mochi_vae, partial(_flow, invert_sigmas=True), call=_MASKS),
        Case("LTX-Video", "LTX-Video", "LTXPipeline", _ltx_vae, partial(_flow, **_LTX_SHIFT), call=_MASKS),
    )
}  # fmt: skip
