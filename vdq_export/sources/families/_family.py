"""What a file about a family of video transformers says: one Family, with all that is particular to it.

Shapes: B=1 batch, C latent channels, T latent frames, H × W latent rows and columns, L text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vdq_export.errors import ModelError

Config = Mapping[str, Any]
Layout = Literal["CTHW", "TCHW", "tokens"]
CHANNEL_AXIS = {"CTHW": 1, "TCHW": 2, "tokens": 2}
TEXT_WIDTHS = ("caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim")  # the first that is set


@dataclass(frozen=True)
class Size:
    """Of one video. frames, height, width: in pixels; t, h, w: of its latent; tokens: of its text.

    temporal, spatial: frames and pixels that one latent element stands for.
    """

    frames: int
    height: int
    width: int
    t: int
    h: int
    w: int
    tokens: int
    temporal: int = 4
    spatial: int = 8


@dataclass(frozen=True)
class Input:
    """A tensor that a network takes beside latent and timestep, the same at every step of a guidance branch.

    value: what it holds where nothing is given (a mask of ones, a guidance scale); None: the prompt's, random in tests.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    value: float | None = None

    def make(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Its value everywhere, or normal numbers."""
        if self.value is not None:
            return torch.full(self.shape, self.value, dtype=self.dtype)
        return torch.randn(self.shape, generator=generator).to(self.dtype)


@dataclass(frozen=True)
class Published:
    """One published model: its settings where they are not the class's defaults.

    parameters, linears: what the network of these settings has; 0: not published.
    """

    name: str
    settings: Config = field(default_factory=dict)
    parameters: float = 0.0
    linears: int = 0


@dataclass(frozen=True)
class Tiny:
    """A small configuration of the family's structure, exported in the tests.

    variant: "" for the family's main form. video: frames, height, width of a small video; tokens: of its text.
    """

    settings: Config
    video: tuple[int, int, int]
    variant: str = ""
    tokens: int = 8


def text_width(config: Config) -> int:
    """D. Raises ModelError where the configuration does not say."""
    for name in TEXT_WIDTHS:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(
        f"the configuration has no width of the text ({', '.join(TEXT_WIDTHS)})",
        hint="write a factory and give package.module:factory",
    )


def mask(size: Size, tokens: int | None = None) -> Input:
    """A 0/1 mask [B, L] over text tokens, all of which count unless a prompt says otherwise."""
    return Input((1, tokens or size.tokens), torch.int64, 1)


def text(config: Config, size: Size) -> dict[str, Input]:
    """encoder_hidden_states [B, L, D] alone."""
    return {"encoder_hidden_states": Input((1, size.tokens, text_width(config)))}


def text_and_mask(config: Config, size: Size) -> dict[str, Input]:
    """encoder_hidden_states [B, L, D] and encoder_attention_mask [B, L]."""
    return {**text(config, size), "encoder_attention_mask": mask(size)}


def nothing(config: Config, size: Size) -> dict[str, Any]:
    """No argument is fixed."""
    return {}


@dataclass(frozen=True)
class Family:
    """A transformer class: how it is called, what is published, and what its pipeline takes for granted.

    name: as people say it; class_name: of the transformer in diffusers; pipelines: pipeline classes that use it.
    video: frames, height, width it is made for; None: must be chosen. steps, guidance, text_tokens: the pipeline's
    defaults. scheduler: the published pipeline's configuration, for a transformer folder, which has none.
    temporal, spatial: frames and pixels that one latent element stands for, unless the pipeline's VAE says otherwise;
    first_alone: the first frame is a latent of its own. layout: axes of hidden_states behind the batch.
    integer_time: its timesteps are int64.
    inputs(config, size): tensors beside latent and timestep that no step of a branch changes.
    fixed(config, size): arguments given once for all, constants of the graph.
    beside(config, size): channels [1, C', T, H, W] that hidden_states has behind the noise's (an image's latent and its
    mask); None: the network is conditioned on the inputs alone.
    """

    name: str
    class_name: str
    pipelines: tuple[str, ...] = ()
    video: tuple[int, int, int] | None = None
    steps: int = 50
    guidance: float = 5.0
    text_tokens: int = 256
    scheduler: Config | None = None
    temporal: int = 4
    spatial: int = 8
    first_alone: bool = True
    layout: Layout = "CTHW"
    integer_time: bool = False
    inputs: Callable[[Config, Size], dict[str, Input]] = text
    fixed: Callable[[Config, Size], dict[str, Any]] = nothing
    beside: Callable[[Config, Size], torch.Tensor | None] | None = None
    published: tuple[Published, ...] = ()
    tiny: tuple[Tiny, ...] = ()

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(T, H, W) of a video in pixels."""
        size = self.size((frames, height, width))
        return size.t, size.h, size.w

    def size(
        self, video: tuple[int, int, int], tokens: int | None = None, scales: tuple[int, int] | None = None
    ) -> Size:
        """The size of a video. scales: (temporal, spatial) of its VAE; None: the family's. Checks nothing."""
        temporal, spatial = scales or (self.temporal, self.spatial)
        frames, height, width = video
        t = (frames - 1) // temporal + 1 if self.first_alone else frames // temporal
        latent = (t, height // spatial, width // spatial)
        return Size(*video, *latent, tokens or self.text_tokens, temporal, spatial)

    def latent(self, config: Config, size: Size) -> tuple[int, ...]:
        """Shape of hidden_states, channels beside the noise included."""
        c, t, h, w = int(config["in_channels"]), size.t, size.h, size.w
        return {"CTHW": (1, c, t, h, w), "TCHW": (1, t, c, h, w), "tokens": (1, t * h * w, c)}[self.layout]

    @property
    def channel_axis(self) -> int:
        return CHANNEL_AXIS[self.layout]

    def network_class(self) -> type[torch.nn.Module]:
        """The transformer's class. Raises ModelError where the installed diffusers has none of the name."""
        import diffusers.models.transformers as transformers

        if not hasattr(transformers, self.class_name):
            raise ModelError(f"the installed diffusers has no {self.class_name}", hint="install a newer diffusers")
        kind: type[torch.nn.Module] = getattr(transformers, self.class_name)
        return kind
