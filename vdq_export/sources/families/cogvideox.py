"""CogVideoX: joint attention over text and video; learned positions (2B) or rotary tables from outside (5B, 1.5).

Image to video: the image's latent, then zeros, beside the noise. 1.5 makes tokens of two latent frames.
"""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.sources.families._family import Config, Family, Published, Size, Tiny, beside_noise, seeded

_OFS = 2.0  # what the pipeline passes as ofs to networks that embed it (1.5 image to video)


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """The rotary tables and ofs, where the network takes some."""
    fixed: dict[str, Any] = {}
    if config.get("use_rotary_positional_embeddings"):
        patch = int(config["patch_size"])
        fixed["image_rotary_emb"] = rotary_tables(config, size.t, size.h // patch, size.w // patch)
    if config.get("ofs_embed_dim"):
        fixed["ofs"] = torch.full((1,), _OFS)
    return fixed


def _beside(config: Config, size: Size) -> torch.Tensor | None:
    """The latent of the first frame; none of the others is known."""
    if not (channels := beside_noise(config)):
        return None
    latent = torch.zeros(1, _frames(config, size.t), channels, size.h, size.w)
    latent[:, 0] = seeded(1, channels, size.h, size.w)
    return latent


def _frames(config: Config, frames: int) -> int:
    """Whole patches of latent frames."""
    patch = int(config.get("patch_size_t") or 1)
    return -(-frames // patch) * patch


def rotary_tables(config: Config, t: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), [T·rows·columns, head width] each, for a grid of tokens, as the pipeline computes them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch, patch_t = int(config["patch_size"]), config.get("patch_size_t")
    base = int(config["sample_height"]) // patch, int(config["sample_width"]) // patch
    common = {"embed_dim": config["attention_head_dim"], "grid_size": (rows, columns)}
    if patch_t is not None:  # version 1.5: positions as they are, cut from the largest grid
        made = get_3d_rotary_pos_embed(
            **common, crops_coords=None, temporal_size=-(-t // patch_t), grid_type="slice", max_size=base
        )
    else:  # version 1: positions stretched, centred, to the grid it was trained on
        ratio = min(base[0] / rows, base[1] / columns)
        size = round(rows * ratio), round(columns * ratio)
        corner = round((base[0] - size[0]) / 2), round((base[1] - size[1]) / 2)
        crops = corner, (corner[0] + size[0], corner[1] + size[1])
        made = get_3d_rotary_pos_embed(**common, crops_coords=crops, temporal_size=t)
    cos, sin = made[0], made[1]
    return cos, sin


_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 16,
    "text_embed_dim": 32, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 9,
    "max_text_seq_length": 8,
}  # fmt: skip
_ROTARY = {**_TINY, "use_rotary_positional_embeddings": True}

FAMILY = Family(
    name="CogVideoX",
    class_name="CogVideoXTransformer3DModel",
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    video=(49, 480, 720),
    guidance=6.0,
    text_tokens=226,
    layout="TCHW",
    integer_time=True,
    scheduler={
        "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "snr_shift_scale": 3.0,
    },
    fixed=_fixed,
    beside=_beside,
    frames=_frames,
    published=(
        Published("CogVideoX-2b", {}, 1.694e9, 245),
        Published("CogVideoX-5b", _5B, 5.570e9, 341),
        Published(
            "CogVideoX1.5-5B",
            {
                **_5B, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300,
                "sample_frames": 81,
            },
            5.571e9,
            342,
        ),
    ),
    tiny=(
        Tiny(_TINY, (9, 64, 64)),
        Tiny(_ROTARY, (9, 64, 64), variant="rotary"),
        Tiny({**_ROTARY, "patch_size_t": 2, "patch_bias": False}, (9, 64, 64), variant="1.5"),
        Tiny({**_ROTARY, "in_channels": 8}, (9, 64, 64), variant="I2V"),
    ),
)  # fmt: skip
