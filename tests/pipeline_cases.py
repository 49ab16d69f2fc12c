"""The pipelines of tests/pipelines.py: one Case a family or variant, at the smallest size its network takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch

from tests.pipelines import Case, sensible

# -- Wan and its kin -------------------------------------------------------------------------------------------------

_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 96, "num_layers": 2, "rope_max_seq_len": 16,
}  # fmt: skip


def _network(class_name: str, seed: int, **settings: Any) -> torch.nn.Module:
    return sensible(getattr(diffusers, class_name)(**settings), seed)


def _wan_vae(**settings: Any) -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, **settings,
    )  # fmt: skip


def _unipc(shift: float = 3.0) -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def _image() -> torch.Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))


_I2V = _WAN | {"in_channels": 12}  # latent, 4 mask channels, the image's latent
WAN = (
    Case("Wan2.1 T2V", "WanPipeline", partial(_network, "WanTransformer3DModel", **_WAN, cross_attn_norm=True),
         _wan_vae, _unipc, (5, 64, 64)),
    Case("Wan2.1 I2V", "WanImageToVideoPipeline",
         partial(_network, "WanTransformer3DModel", **_I2V, cross_attn_norm=True, image_dim=40, added_kv_proj_dim=48),
         _wan_vae, _unipc, (5, 64, 64),
         call={"image": _image(), "image_embeds": torch.randn(1, 257, 40, generator=torch.Generator().manual_seed(6))}),
    Case("Wan2.2 T2V, two experts", "WanPipeline",
         partial(_network, "WanTransformer3DModel", **_WAN, cross_attn_norm=True), _wan_vae, _unipc, (5, 64, 64),
         experts=2, settings={"boundary_ratio": 0.875}, call={"guidance_scale_2": 1.5}, steps=4,
         options={"guidance_2": 1.5}),
    Case("Wan2.2 I2V, two experts", "WanImageToVideoPipeline",
         partial(_network, "WanTransformer3DModel", **_I2V, cross_attn_norm=True), _wan_vae, _unipc, (5, 64, 64),
         experts=2, settings={"boundary_ratio": 0.9}, call={"image": _image()}, steps=4),
    Case("Wan2.2 TI2V, timesteps by token", "WanPipeline",
         partial(_network, "WanTransformer3DModel", **_WAN, cross_attn_norm=True), _wan_vae, _unipc, (5, 64, 64),
         settings={"expand_timesteps": True}),
    Case("SkyReels-V2", "SkyReelsV2Pipeline", partial(_network, "SkyReelsV2Transformer3DModel", **_WAN), _wan_vae,
         partial(_unipc, 8.0), (5, 64, 64)),
)  # fmt: skip

# -- CogVideoX -------------------------------------------------------------------------------------------------------

_COG = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 32, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 8,
}  # fmt: skip


def _cog_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4, sample_height=64, sample_width=64,
    )  # fmt: skip


def _cog_ddim() -> Any:
    return diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    )


def _cog_dpm() -> Any:
    return diffusers.CogVideoXDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )


_ROTARY = _COG | {"use_rotary_positional_embeddings": True}
COGVIDEOX = (
    Case("CogVideoX 2B", "CogVideoXPipeline", partial(_network, "CogVideoXTransformer3DModel", **_COG), _cog_vae,
         _cog_ddim, (9, 64, 64)),
    Case("CogVideoX 5B", "CogVideoXPipeline", partial(_network, "CogVideoXTransformer3DModel", **_ROTARY), _cog_vae,
         _cog_dpm, (9, 64, 64)),
    Case("CogVideoX 1.5", "CogVideoXPipeline",
         partial(_network, "CogVideoXTransformer3DModel", **_ROTARY, patch_size_t=2, patch_bias=False), _cog_vae,
         _cog_dpm, (13, 64, 64)),
    Case("CogVideoX I2V", "CogVideoXImageToVideoPipeline",
         partial(_network, "CogVideoXTransformer3DModel", **_ROTARY | {"in_channels": 8}), _cog_vae,
         _cog_dpm, (9, 64, 64), call={"image": _image()}),
)  # fmt: skip

# -- Latte, Allegro, Cosmos ------------------------------------------------------------------------------------------


def _latte_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=2,
    )  # fmt: skip


def _allegro_vae() -> Any:
    made = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=64
    )
    made.enable_tiling()  # its decoder has no other form
    return made


def _cosmos_vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(64,), resolution=64, num_layers=1, latents_mean=None, latents_std=None,
    )  # fmt: skip


class _NoChecker:
    """Stands where Cosmos wants its safety checker, which is a download."""

    def to(self, _device: object) -> None: ...

    def check_video_safety(self, video: Any) -> Any:
        return video


OTHERS = (
    Case("Latte", "LattePipeline",
         partial(_network, "LatteTransformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=4,
                 out_channels=8, num_layers=2, cross_attention_dim=48, attention_bias=True, sample_size=8, patch_size=2,
                 caption_channels=32, activation_fn="gelu-approximate", norm_type="ada_norm_single",
                 norm_elementwise_affine=False, norm_eps=1e-6, num_embeds_ada_norm=1000, video_length=4),
         _latte_vae, partial(diffusers.DDIMScheduler, beta_schedule="linear", clip_sample=False), (4, 64, 64),
         call={"clean_caption": False}),
    Case("Allegro", "AllegroPipeline",
         partial(_network, "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=24, num_layers=2,
                 in_channels=4, out_channels=4, cross_attention_dim=48, sample_height=8, sample_width=8,
                 sample_frames=2, caption_channels=32),
         _allegro_vae, diffusers.EulerAncestralDiscreteScheduler, (8, 64, 64), masked=True,
         call={"clean_caption": False}),
    Case("Cosmos", "CosmosTextToWorldPipeline",
         partial(_network, "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2,
                 attention_head_dim=16, num_layers=2, text_embed_dim=32, adaln_lora_dim=8, max_size=(4, 16, 16),
                 concat_padding_mask=False),  # resizing one takes torchvision
         _cosmos_vae, partial(diffusers.EDMEulerScheduler, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5,
                              sigma_schedule="karras", num_train_timesteps=1000, prediction_type="epsilon",
                              rho=7.0, final_sigmas_type="sigma_min"),
         (9, 64, 64), parts={"safety_checker": _NoChecker()}),
)  # fmt: skip

CASES = {case.name: case for case in (*WAN, *COGVIDEOX, *OTHERS)}
