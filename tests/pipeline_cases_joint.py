"""Pipelines whose networks attend jointly to text and video: HunyuanVideo, Mochi, LTX. See tests/pipelines.py.

Prompts are padded: the last tokens are masked, differently for both guidance branches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.pipelines import ltx2

from tests.pipelines import Case


def _mask(kept: int, tokens: int = 8) -> torch.Tensor:
    return (torch.arange(tokens)[None] < kept).to(torch.int64)


def _noise(*arguments: Any) -> torch.Tensor:
    """Normal numbers of the shape that the arguments begin with; the generator is the last."""
    *shape, generator = arguments
    return torch.randn(shape, generator=generator)


def _image(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=generator)


_MASKS = {"prompt_attention_mask": _mask(6), "negative_prompt_attention_mask": _mask(2)}


def _made(name: str, **settings: Any) -> Any:
    """A component, of a class of diffusers or of LTX-2's pipeline."""
    return getattr(diffusers if hasattr(diffusers, name) else ltx2, name)(**settings)


def _flow(**settings: Any) -> Any:
    return _made("FlowMatchEulerDiscreteScheduler", **settings)


def _hunyuan_vae() -> Any:
    return _made(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
    )


def _hunyuan15_vae() -> Any:
    return _made(
        "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(16, 16, 16, 16, 16), layers_per_block=1
    )


def _mochi_vae() -> Any:
    return _made("AutoencoderKLMochi",
        latent_channels=4, encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=None, latents_std=None,
    )  # fmt: skip


def _ltx_vae() -> Any:
    return _made("AutoencoderKLLTXVideo",
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip


def _ltx2_vae() -> Any:
    return _made("AutoencoderKLLTX2Video",
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip


def _ltx2_audio_vae() -> Any:
    return _made(
        "AutoencoderKLLTX2Audio", base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16
    )


def _connectors() -> Any:
    return _made(
        "LTX2TextConnectors",
        caption_channels=32, text_proj_in_factor=1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16, video_connector_num_layers=1,
        video_connector_num_learnable_registers=8, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16, audio_connector_num_layers=1, audio_connector_num_learnable_registers=8,
    )  # fmt: skip


def _vocoder() -> Any:
    return _made(
        "LTX2Vocoder",
        in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1]],
    )  # fmt: skip


_LTX_SHIFT = {
    "use_dynamic_shifting": True, "base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95,
    "max_shift": 2.05, "shift_terminal": 0.1,
}  # fmt: skip


def _guider() -> Any:
    return _made("ClassifierFreeGuidance", guidance_scale=2.0)


# The graphs are of the plain network: no second and third pass without attention between video and audio, or in blocks.
_LTX2_PLAIN = {
    "audio_guidance_scale": 2.0, "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0,
    "audio_modality_scale": 1.0, "spatio_temporal_guidance_blocks": None,
}  # fmt: skip
_ONE_BRANCH = {"guidance_scale": 6.0, "pooled_prompt_embeds": partial(_noise, 1, 16), **_MASKS}
CASES = {
    case.name: case
    for case in (
        Case("HunyuanVideo", "HunyuanVideo", "HunyuanVideoPipeline", _hunyuan_vae, partial(_flow, shift=7.0),
             call=_ONE_BRANCH, guidance=1.0),
        Case("HunyuanVideo, true guidance", "HunyuanVideo", "HunyuanVideoPipeline", _hunyuan_vae,
             partial(_flow, shift=7.0),
             call={**_ONE_BRANCH, "true_cfg_scale": 2.0, "negative_pooled_prompt_embeds": partial(_noise, 1, 16)}),
        Case("HunyuanVideo I2V", "HunyuanVideo-I2V", "HunyuanVideoImageToVideoPipeline", _hunyuan_vae,
             partial(_flow, shift=7.0), guidance=1.0,
             call={**_ONE_BRANCH, "guidance_scale": 1.0, "image": _image}),
        Case("HunyuanVideo 1.5", "HunyuanVideo-1.5", "HunyuanVideo15Pipeline", _hunyuan15_vae,
             partial(_flow, shift=5.0), parts={"guider": _guider},
             call={"prompt_embeds_mask": _mask(6), "negative_prompt_embeds_mask": _mask(2),
                   "prompt_embeds_2": partial(_noise, 1, 8, 24), "negative_prompt_embeds_2": partial(_noise, 1, 8, 24),
                   "prompt_embeds_mask_2": _mask(3), "negative_prompt_embeds_mask_2": _mask(1)}),
        Case("Mochi", "Mochi", "MochiPipeline", _mochi_vae, partial(_flow, invert_sigmas=True), call=_MASKS),
        Case("LTX-Video", "LTX-Video", "LTXPipeline", _ltx_vae, partial(_flow, **_LTX_SHIFT), call=_MASKS),
        Case("LTX-2", "LTX-2", "LTX2Pipeline", _ltx2_vae, partial(_flow, **_LTX_SHIFT),
             parts={"audio_vae": _ltx2_audio_vae, "connectors": _connectors, "vocoder": _vocoder},
             call={**_MASKS, **_LTX2_PLAIN}),
    )
}  # fmt: skip
