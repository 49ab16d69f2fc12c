"""Video transformer families of diffusers: what is known of each, and how its network is called.

Shapes: B=1 batch, C latent channels, T latent frames, H × W latent rows and columns, L text tokens, D text width.
A class that is not in FAMILIES can still be taken where its forward asks for nothing but KNOWN arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vdq_export.errors import ModelError

SUFFIX = "Transformer3DModel"
KNOWN = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance",
)  # fmt: skip
TEXT_WIDTHS = ("caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim")  # the first that is set


@dataclass(frozen=True)
class Published:
    """One published model: its settings where they are not the class's defaults.

    parameters, linears: what the network of these settings has; 0: not published here.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: float = 0.0
    linears: int = 0


@dataclass(frozen=True)
class Family:
    """A transformer class whose call is known.

    temporal, spatial: frames and pixels that one latent element stands for. video: frames, height, width it is made
    for. layout: axes of hidden_states behind the batch. integer_time: its timesteps are int64. masked: the text mask is
    an input; fixed_mask: it decides on shapes, and is therefore given once.
    """

    name: str
    class_name: str
    video: tuple[int, int, int]
    published: tuple[Published, ...] = ()
    text_tokens: int = 256
    temporal: int = 4
    spatial: int = 8
    layout: Literal["CTHW", "TCHW", "tokens"] = "CTHW"
    integer_time: bool = False
    masked: bool = False
    fixed_mask: bool = False

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of a video in pixels; the first frame is a latent of its own."""
        return (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial


_WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_LATTE = {
    "num_layers": 28, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "patch_size": 2,
    "cross_attention_dim": 1152, "attention_bias": True, "activation_fn": "gelu-approximate", "norm_eps": 1e-6,
    "norm_type": "ada_norm_single", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000,
    "caption_channels": 4096,
}  # fmt: skip
FAMILIES = (
    Family(
        "Wan", "WanTransformer3DModel", (81, 480, 832), text_tokens=512,
        published=(
            Published("Wan2.1-T2V-1.3B", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.419e9, 306),
            Published("Wan2.1-T2V-14B", _WAN_14B, 14.288e9, 406),
            Published("Wan2.2-I2V-A14B (each expert)", {**_WAN_14B, "in_channels": 36}, 14.289e9, 406),
        ),
    ),
    Family("SkyReelsV2", "SkyReelsV2Transformer3DModel", (97, 544, 960), text_tokens=512),
    Family(
        "HunyuanVideo", "HunyuanVideoTransformer3DModel", (129, 720, 1280), masked=True,
        published=(Published("HunyuanVideo", {}, 12.821e9, 547),),
    ),
    Family(
        "CogVideoX", "CogVideoXTransformer3DModel", (49, 480, 720), text_tokens=226, layout="TCHW", integer_time=True,
        published=(Published("CogVideoX-2b", {}, 1.694e9, 245),),
    ),
    Family(
        "LTX-Video", "LTXVideoTransformer3DModel", (161, 512, 704), text_tokens=128, temporal=8, spatial=32,
        layout="tokens", masked=True, published=(Published("LTX-Video 2B", {}, 1.923e9, 287),),
    ),
    Family(
        "Latte", "LatteTransformer3DModel", (16, 512, 512), text_tokens=120, temporal=1, integer_time=True,
        published=(Published("Latte-1 T2V", _LATTE, 1.057e9, 454),),
    ),
    Family("Mochi", "MochiTransformer3DModel", (85, 480, 848), temporal=6, fixed_mask=True),
    Family("Allegro", "AllegroTransformer3DModel", (88, 720, 1280), text_tokens=512, integer_time=True, masked=True),
    Family("Cosmos", "CosmosTransformer3DModel", (121, 704, 1280), text_tokens=512, temporal=8),
)  # fmt: skip


@dataclass(frozen=True)
class Support:
    """What is known of one class. support: "registered", "generic" (not tried, but nothing unknown is asked for) or
    "unsupported"; detail: the video it is made for, what is taken, or what is in the way."""

    name: str
    class_name: str
    support: Literal["registered", "generic", "unsupported"]
    detail: str
    published: tuple[str, ...] = ()


def find(class_name: str) -> Family | None:
    """The family of a transformer class, if it is registered."""
    return next((one for one in FAMILIES if one.class_name == class_name), None)


def classes() -> dict[str, type[torch.nn.Module]]:
    """{class name: class} of every video transformer in the installed release of diffusers."""
    import diffusers.models.transformers as transformers

    return {name: getattr(transformers, name) for name in sorted(dir(transformers)) if name.endswith(SUFFIX)}


def support() -> list[Support]:
    """What is known of each class: registered families first, in their order."""
    found = classes()
    known = [_registered(one) for one in FAMILIES if one.class_name in found]
    taken = {one.class_name for one in known}
    return known + [_other(name, kind) for name, kind in found.items() if name not in taken]


def _registered(family: Family) -> Support:
    frames, height, width = family.video
    detail = f"{frames} frames of {height}×{width}, {family.text_tokens} text tokens"
    return Support(family.name, family.class_name, "registered", detail, tuple(p.name for p in family.published))


def _other(class_name: str, kind: type[torch.nn.Module]) -> Support:
    """A class by its signature: what forward requires, and what its configuration says of channels and text."""
    required = [
        p.name for p in list(inspect.signature(kind.forward).parameters.values())[1:] if p.default is p.empty
    ]  # fmt: skip
    settings = inspect.signature(kind).parameters
    name = class_name.removesuffix(SUFFIX)
    if unknown := [argument for argument in required if argument not in KNOWN]:
        return Support(name, class_name, "unsupported", f"forward requires {', '.join(unknown)}")
    if "in_channels" not in settings:
        return Support(name, class_name, "unsupported", "its configuration has no in_channels")
    if "encoder_hidden_states" in required and not any(width in settings for width in TEXT_WIDTHS):
        return Support(name, class_name, "unsupported", "its configuration has no width of the text")
    return Support(name, class_name, "generic", f"not tried; forward takes {', '.join(required)}")


def example_inputs(
    family: Family, config: Mapping[str, Any], size: tuple[int, int, int], text_tokens: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(inputs by name, arguments that no step changes) of a network of `family` with this configuration.

    size: (T, H, W) of the latent. Inputs are random, but for timestep 500 and masks without a masked token.
    Raises ModelError for a configuration with rotary tables from outside, which only its pipeline can compute.
    """
    if config.get("use_rotary_positional_embeddings"):
        raise ModelError(f"{family.class_name} takes image_rotary_emb here", hint="pass its pipeline's tables")
    (t, h, w), tokens = size, text_tokens or family.text_tokens
    channels = int(config["in_channels"])
    latent = {"CTHW": (1, channels, t, h, w), "TCHW": (1, t, channels, h, w), "tokens": (1, t * h * w, channels)}
    width = next(int(config[name]) for name in TEXT_WIDTHS if config.get(name))
    inputs = {
        "hidden_states": torch.randn(latent[family.layout]),
        "timestep": torch.tensor([500 if family.integer_time else 500.0]),
        "encoder_hidden_states": torch.randn(1, tokens, width),
    }
    fixed: dict[str, Any] = {}
    if family.masked or family.fixed_mask:
        (fixed if family.fixed_mask else inputs)["encoder_attention_mask"] = torch.ones(1, tokens, dtype=torch.int64)
    if family.class_name == "HunyuanVideoTransformer3DModel":
        inputs["pooled_projections"] = torch.randn(1, int(config["pooled_projection_dim"]))
        if config.get("guidance_embeds"):
            fixed["guidance"] = torch.tensor([6000.0])
    if family.layout == "tokens":
        fixed.update(num_frames=t, height=h, width=w)
    if config.get("concat_padding_mask"):
        fixed["padding_mask"] = torch.zeros(1, 1, h, w)
    return inputs, fixed
