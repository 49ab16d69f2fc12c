"""Open-Sora v1's STDiT: spatial, temporal and cross-attention in a block. Not in diffusers: its module is ours."""

from __future__ import annotations

import torch

from vdq_export.sources.families._family import Family, Published, Tiny, text_and_mask


def _network() -> type[torch.nn.Module]:
    from vdq_export.sources._stdit import STDiT

    kind: type[torch.nn.Module] = STDiT
    return kind


FAMILY = Family(
    name="Open-Sora STDiT",
    class_name="STDiT",
    network=_network,
    video=(16, 512, 512),
    steps=20,
    guidance=7.0,
    text_tokens=120,
    temporal=1,  # its VAE takes single images
    integer_time=True,
    # IDDPM: the variance that the network predicts beside the noise is left out, as it only scales what is drawn
    scheduler={
        "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
        "beta_end": 0.02, "clip_sample": False, "variance_type": "fixed_small", "timestep_spacing": "linspace",
    },
    inputs=text_and_mask,
    published=(Published("Open-Sora v1 STDiT-XL/2", {}, 759.621e6, 258),),
    tiny=(
        Tiny(
            {"hidden_size": 48, "num_attention_heads": 2, "num_layers": 2, "caption_channels": 32},
            (4, 64, 64),
        ),
    ),
)  # fmt: skip
