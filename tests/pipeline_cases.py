"""Pipelines of tests/pipelines.py, at the smallest size their networks take: Wan and its kin, CogVideoX, Latte,
Allegro, Cosmos. Those of joint attention are in pipeline_cases_joint.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from tests.pipelines import Case

BLOCKS = (8, 8, 8, 8)
MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")


def _image(generator: torch.Generator) -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=generator)


# -- Wan and its kin -------------------------------------------------------------------------------------------------


def _wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _unipc(shift: float = 3.0) -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _image_encoder() -> torch.nn.Module:
    """257 tokens of width 40, as the configuration wants them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings = CLIPVisionConfig(
        hidden_size=40, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14
    )
    return CLIPVisionModel(settings).eval()


class _Batch(dict[str, Any]):
    def to(self, _device: object) -> _Batch:
        return self


class _ImageProcessor:
    """diffusers wants CLIP's, which asks for torchvision."""

    def __call__(self, images: torch.Tensor, return_tensors: str) -> _Batch:
        return _Batch(pixel_values=torch.nn.functional.interpolate(images, size=(224, 224)))


WAN = (
    Case("Wan2.1 T2V", "Wan", "WanPipeline", _wan_vae, _unipc),
    Case("Wan2.1 I2V", "Wan-I2V", "WanImageToVideoPipeline", _wan_vae, _unipc, call={"image": _image},
         parts={"image_encoder": _image_encoder, "image_processor": _ImageProcessor}),
    Case("Wan2.2 T2V, two experts", "Wan", "WanPipeline", _wan_vae, _unipc, experts=2, steps=4,
         settings={"boundary_ratio": 0.875}, call={"guidance_scale_2": 1.5}, options={"guidance_2": 1.5}),
    Case("Wan2.2 I2V, two experts", "Wan-2.2-I2V", "WanImageToVideoPipeline", _wan_vae, _unipc, experts=2, steps=4,
         settings={"boundary_ratio": 0.9}, call={"image": _image}),
    Case("Wan2.2 TI2V, T2V", "Wan", "WanPipeline", _wan_vae, _unipc, settings={"expand_timesteps": True}),
    Case("Wan2.2 TI2V, I2V", "Wan", "WanImageToVideoPipeline", _wan_vae, _unipc, settings={"expand_timesteps": True},
         call={"image": _image}),
    Case("SkyReels-V2", "SkyReelsV2", "SkyReelsV2Pipeline", _wan_vae, partial(_unipc, 8.0)),
)  # fmt: skip

# -- CogVideoX -------------------------------------------------------------------------------------------------------


def _cog_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=BLOCKS, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=64, sample_width=64,
    )  # fmt: skip


def _cog(kind: Any) -> Any:
    return kind(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )


_DDIM, _DPM = partial(_cog, diffusers.CogVideoXDDIMScheduler), partial(_cog, diffusers.CogVideoXDPMScheduler)
COGVIDEOX = (
    Case("CogVideoX 2B", "CogVideoX", "CogVideoXPipeline", _cog_vae, _DDIM),
    Case("CogVideoX 5B", "CogVideoX-rotary", "CogVideoXPipeline", _cog_vae, _DPM),
    Case("CogVideoX 1.5", "CogVideoX-1.5", "CogVideoXPipeline", _cog_vae, _DPM),
    Case("CogVideoX I2V", "CogVideoX-I2V", "CogVideoXImageToVideoPipeline", _cog_vae, _DPM, call={"image": _image}),
)

# -- the others ------------------------------------------------------------------------------------------------------


def _mild(kind: Any) -> Any:
    """Noise of 1.4 at most instead of 157: random weights take none away, and latents would grow from step to step."""
    return kind(beta_end=0.002, beta_schedule="linear")


def _latte_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=BLOCKS, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip


def _allegro_vae() -> Any:
    made = diffusers.AutoencoderKLAllegro(
        block_out_channels=BLOCKS, latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=64,
    )  # fmt: skip
    made.enable_tiling()  # its decoder has no other form
    made.kernel, made.stride = (8, 64, 64), (8, 64, 64)  # of a tile: frames, height, width
    return made


def _cosmos_vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=BLOCKS, decode_block_out_channels=BLOCKS,
        attention_resolutions=(64,), resolution=64, num_layers=1, latents_mean=None, latents_std=None,
    )  # fmt: skip


def _edm() -> Any:
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
        prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
    )  # fmt: skip


class _NoChecker:
    """Stands where Cosmos wants its safety checker, which is a download."""

    def to(self, _device: object) -> None: ...

    def check_video_safety(self, video: Any) -> Any:
        return video


OTHERS = (
    Case("Latte", "Latte", "LattePipeline", _latte_vae,
         partial(_mild, partial(diffusers.DDIMScheduler, clip_sample=False)), call={"clean_caption": False}),
    Case("Allegro", "Allegro", "AllegroPipeline", _allegro_vae,
         partial(_mild, diffusers.EulerAncestralDiscreteScheduler),
         masks=MASKS, call={"clean_caption": False}),
    Case("Cosmos", "Cosmos", "CosmosTextToWorldPipeline", _cosmos_vae, _edm, parts={"safety_checker": _NoChecker}),
)  # fmt: skip

CASES = {case.name: case for case in (*WAN, *COGVIDEOX, *OTHERS)}
