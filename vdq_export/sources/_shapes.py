"""Static shapes of a video transformer: from frames × height × width in pixels to what the network is called with.

Shapes: B=1 batch, C latent channels, T latent frames, H × W latent rows and columns, L text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vdq_export.errors import ModelError
from vdq_export.sources._options import Options
from vdq_export.sources._weights import Network, read_json

Layout = Literal["CTHW", "TCHW", "tokens"]
FRAME_RATE = 25.0  # frames a second that LTX's rotary embedding is scaled for, its pipeline's default
KNOWN_ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
_TEXT_WIDTHS = ("text_dim", "text_embed_dim", "caption_channels", "cross_attention_dim")


@dataclass(frozen=True)
class Family:
    """Defaults of a transformer class, those of its diffusers pipeline: used where the folder and options say nothing.

    temporal, spatial: frames and pixels a latent stands for. video: frames, height, width; None: must be chosen.
    """

    temporal: int = 4
    spatial: int = 8
    video: tuple[int, int, int] | None = None
    steps: int = 50
    guidance: float = 5.0
    text_tokens: int = 256
    layout: Layout = "CTHW"


FAMILIES: Mapping[str, Family] = {
    "WanTransformer3DModel": Family(video=(81, 480, 832), text_tokens=512),
    "CogVideoXTransformer3DModel": Family(video=(49, 480, 720), guidance=6.0, text_tokens=226, layout="TCHW"),
    "LTXVideoTransformer3DModel": Family(8, 32, (161, 512, 704), guidance=3.0, text_tokens=128, layout="tokens"),
}


@dataclass(frozen=True)
class Call:
    """How the network is called: the latent's shape, the text's, and arguments that no step changes."""

    family: Family
    frames: int
    height: int
    width: int
    latent: tuple[int, ...]  # of hidden_states, by the family's layout
    text: tuple[int, int, int]  # B, L, D
    masked: bool  # it is given encoder_attention_mask [B, L]
    fixed: Mapping[str, Any]

    @property
    def channel_axis(self) -> int:
        return {"CTHW": 1, "TCHW": 2, "tokens": 2}[self.family.layout]


def call(network: Network, origin: str, vae: Path | None, options: Options, text_tokens: int | None) -> Call:
    """The call of `network` at the sizes chosen. text_tokens: of the embeddings there are; None: the family's.

    Raises ModelError for sizes that the model cannot take (saying which it can) and arguments not known here.
    """
    config, family = dict(network.module.config), FAMILIES.get(network.class_name, Family())  # type: ignore[arg-type]
    masked = _takes_mask(network, origin)
    _refuse_conditioning(config, origin)
    temporal, spatial = _scales(vae, family)
    patch_t, patch = _patches(config)
    frames, height, width = _sizes(network.class_name, family, options)
    _check_sizes(origin, (frames, height, width), (temporal, patch_t), spatial * patch)
    t, h, w = (frames - 1) // temporal + 1, height // spatial, width // spatial
    channels = int(config["in_channels"])
    latent = {"CTHW": (1, channels, t, h, w), "TCHW": (1, t, channels, h, w), "tokens": (1, t * h * w, channels)}
    tokens = text_tokens or int(config.get("max_text_seq_length") or family.text_tokens)
    fixed: dict[str, Any] = {}
    if network.class_name == "LTXVideoTransformer3DModel":
        scale = (temporal / FRAME_RATE, spatial, spatial)
        fixed = {"num_frames": t, "height": h, "width": w, "rope_interpolation_scale": scale}
    elif config.get("use_rotary_positional_embeddings"):
        fixed = {"image_rotary_emb": _cogvideox_tables(config, t, h // patch, w // patch)}
    text = (1, tokens, _text_width(config, origin))
    return Call(family, frames, height, width, latent[family.layout], text, masked, fixed)


def _takes_mask(network: Network, origin: str) -> bool:
    """Whether the network must have a text mask. Raises ModelError for a required argument that is not known here."""
    parameters = inspect.signature(network.module.forward).parameters.values()
    ours = {*KNOWN_ARGUMENTS, *(("num_frames", "height", "width") if network.class_name in FAMILIES else ())}
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in ours]
    if getattr(network.module, "config", {}).get("guidance_embeds"):
        needed.append("guidance")
    if needed:
        raise ModelError(
            f"{origin}: {network.class_name} takes {needed[0]!r}, which is not known here",
            hint=f"known: {', '.join(KNOWN_ARGUMENTS)}; write a factory and give package.module:factory",
        )
    return any(p.name == "encoder_attention_mask" and p.default is p.empty for p in parameters)


def _refuse_conditioning(config: Mapping[str, Any], origin: str) -> None:
    """Only text to video: an image or a video beside the noise has no source here."""
    taken, given = config.get("in_channels"), config.get("out_channels")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ModelError(f"{origin} takes image embeddings", hint="only text-to-video models are read from folders")
    if not isinstance(taken, int) or (given is not None and given not in (taken, 2 * taken)):
        raise ModelError(
            f"{origin} takes {taken} channels and returns {given}: it is conditioned on more than text",
            hint="only text-to-video models are read from folders",
        )


def _scales(vae: Path | None, family: Family) -> tuple[int, int]:
    """(frames, pixels) a latent stands for: what the pipeline's VAE says, else the family's."""
    config = read_json(vae) if vae is not None else {}
    temporal = config.get("scale_factor_temporal") or config.get("temporal_compression_ratio") or family.temporal
    spatial = config.get("scale_factor_spatial") or config.get("spatial_compression_ratio") or family.spatial
    if not (isinstance(temporal, int) and isinstance(spatial, int) and temporal > 0 and spatial > 0):
        raise ModelError(f"{vae}: scale factors {temporal!r} and {spatial!r} are no numbers", hint="restore the file")
    return temporal, spatial


def _patches(config: Mapping[str, Any]) -> tuple[int, int]:
    """(latent frames, latent rows and columns) that make one token."""
    size = config.get("patch_size") or 1
    if isinstance(size, int):
        return int(config.get("patch_size_t") or 1), size
    return int(size[0]), max(int(one) for one in size[1:])


def _sizes(class_name: str, family: Family, options: Options) -> tuple[int, int, int]:
    chosen = (options.frames, options.height, options.width)
    sizes = [one or default for one, default in zip(chosen, family.video or (0, 0, 0), strict=True)]
    if not all(sizes):
        raise ModelError(f"no default size of {class_name} is known", hint="give --frames, --height and --width")
    return sizes[0], sizes[1], sizes[2]


def _check_sizes(origin: str, sizes: tuple[int, int, int], time: tuple[int, int], multiple: int) -> None:
    """Frames make whole latent frames and tokens, height and width whole tokens. Raises ModelError with the nearest."""
    frames, height, width = sizes
    temporal, patch = time
    period = temporal * patch
    first = 1 + temporal * (patch - 1)  # latent frames come in multiples of `patch`
    if frames % period != first % period or frames < first:
        below = first + max(frames - first, 0) // period * period
        raise ModelError(
            f"{origin} cannot take {frames} frames",
            hint=f"allowed are {period}k + {first}, for example {below} or {below + period}",
        )
    for name, size in (("height", height), ("width", width)):
        if size % multiple:
            below = max(size // multiple, 1) * multiple
            raise ModelError(
                f"{origin} cannot take a {name} of {size}",
                hint=f"allowed are multiples of {multiple}, for example {below} or {below + multiple}",
            )


def _text_width(config: Mapping[str, Any], origin: str) -> int:
    for name in _TEXT_WIDTHS:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(
        f"{origin}: config.json has no width of the text ({', '.join(_TEXT_WIDTHS)})",
        hint="write a factory and give package.module:factory",
    )


def _cogvideox_tables(config: Mapping[str, Any], t: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """CogVideoX's rotary tables (cos, sin), [T·rows·columns, head width] each, for a grid of tokens."""
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


def fix(network: Network, fixed: Mapping[str, Any]) -> None:
    """Give the arguments that no step changes once, so that they become constants of the graph."""
    from functools import partial

    if fixed:
        network.module.forward = partial(network.module.forward, **fixed)
