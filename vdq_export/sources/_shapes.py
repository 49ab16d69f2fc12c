"""Static shapes of a video transformer: from frames × height × width in pixels to what the network is called with.

Shapes: B=1 batch, C latent channels, T latent frames, H × W latent rows and columns, L text tokens, D text width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.sources import registry
from vdq_export.sources._options import Options
from vdq_export.sources._weights import Network, read_json
from vdq_export.sources.families import Family, Input, Size


@dataclass(frozen=True)
class Call:
    """How the network is called.

    latent: shape of the noise, by the family's layout; beside: channels that hidden_states has behind it. inputs: all
    other tensors but the timestep, the same at every step of a branch. fixed: arguments given once for all. times: what
    t is multiplied with, [1, tokens], where each token has a timestep. also: shapes of further latents by input.
    """

    family: Family
    size: Size
    latent: tuple[int, ...]
    inputs: Mapping[str, Input]
    fixed: Mapping[str, Any]
    beside: torch.Tensor | None = None
    times: torch.Tensor | None = None
    also: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def latents(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all that is denoised, by input."""
        return {"hidden_states": self.latent, **self.also}

    @property
    def channel_axis(self) -> int:
        return self.family.channel_axis

    @property
    def text(self) -> tuple[int, ...]:
        """B, L, D of encoder_hidden_states."""
        return self.inputs["encoder_hidden_states"].shape

    @property
    def starts_given(self) -> bool:
        """Whether `beside` is no more channels but the first latent frame, whose tokens have no noise: timestep 0."""
        return self.times is not None and bool((self.times == 0).any())

    def hidden_states(self, latent: torch.Tensor, beside: torch.Tensor | None = None) -> torch.Tensor:
        """The noise with what is beside it, or in its first frame's place: this, or what the family says."""
        beside = self.beside if beside is None else beside
        if beside is None:
            return latent
        if self.starts_given:
            return torch.cat([beside, latent[:, :, 1:]], dim=2)
        return torch.cat([latent, beside], dim=self.channel_axis)

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """The timestep as the network takes it, [1] or [1, tokens]; of a tensor of them, the highest counts."""
        return t.reshape(-1).max().reshape(1) if self.times is None else self.times * t.max()


def call(
    network: Network,
    origin: str,
    vae: Path | None,
    options: Options,
    text_tokens: int | None,
    index: Mapping[str, Any] | None = None,
) -> Call:
    """The call of `network` at the sizes chosen. text_tokens: of the embeddings there are; None: the family's.

    index: of the pipeline, where there is one. Raises ModelError for sizes that the model cannot take (saying which it
    can) and arguments not known here.
    """
    config: Mapping[str, Any] = {**_pipeline_settings(index or {}), **network.module.config}  # type: ignore[dict-item]
    family = registry.of(network.class_name)
    _refuse_conditioning(family, config, origin)
    scales, (patch_t, patch) = _scales(vae, family), _patches(config)
    patch_t = patch_t if family.frames(config, 1) == 1 else 1  # what is filled up may be of any length
    video = _sizes(family, options)
    _check_sizes(origin, family, video, (scales[0], patch_t), scales[1] * patch)
    size = family.size(video, text_tokens or config.get("max_text_seq_length"), scales)
    try:
        inputs, fixed = family.inputs(config, size), family.fixed(config, size)
        beside = family.beside(config, size) if family.beside is not None else None
    except ModelError as error:
        raise ModelError(f"{origin}: {error.what}", hint=error.hint) from error
    _check_arguments(network, origin, {*inputs, *fixed, *(family.also(config, size) if family.also else ())})
    times = None if family.times is None else family.times(config, size)
    latent = family.latent(config, size)
    also = {} if family.also is None else family.also(config, size)
    made = Call(family, size, latent, inputs, fixed, beside, times, also)
    if beside is None or made.starts_given:
        return made
    axis = family.channel_axis
    noise = latent[axis] - beside.shape[axis]
    return replace(made, latent=(*latent[:axis], noise, *latent[axis + 1 :]))


def _pipeline_settings(index: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline's index says beside its parts; "pipeline": its class."""
    settings = {name: value for name, value in index.items() if name[0] != "_" and not isinstance(value, list)}
    return {**settings, "pipeline": index.get("_class_name")}


def _check_arguments(network: Network, origin: str, given: set[str]) -> None:
    """Raises ModelError for an argument that the network must have and nobody here knows."""
    parameters = inspect.signature(network.module.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if getattr(network.module, "config", {}).get("guidance_embeds"):
        needed.append("guidance")
    given |= {"hidden_states", "timestep"}
    if unknown := [name for name in needed if name not in given]:
        raise ModelError(
            f"{origin}: {network.class_name} takes {unknown[0]!r}, which is not known here",
            hint=f"known: {', '.join(registry.KNOWN)}; write a factory and give package.module:factory",
        )


def _refuse_conditioning(family: Family, config: Mapping[str, Any], origin: str) -> None:
    """Only text to video, unless the family says what else there is: an image or a video beside the noise."""
    if family.beside is not None:
        return
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


def _sizes(family: Family, options: Options) -> tuple[int, int, int]:
    chosen = (options.frames, options.height, options.width)
    sizes = [one or default for one, default in zip(chosen, family.video or (0, 0, 0), strict=True)]
    if not all(sizes):
        raise ModelError(f"no default size of {family.class_name} is known", hint="give --frames, --height and --width")
    return sizes[0], sizes[1], sizes[2]


def _check_sizes(
    origin: str, family: Family, sizes: tuple[int, int, int], time: tuple[int, int], multiple: int
) -> None:
    """Frames make whole latent frames and tokens, height and width whole tokens. Raises ModelError with the nearest."""
    frames, height, width = sizes
    temporal, patch = time
    period = temporal * patch
    first = 1 + temporal * (patch - 1) if family.first_alone else period  # latent frames: multiples of `patch`
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
