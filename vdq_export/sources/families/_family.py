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
Layout = Literal["CTHW", "TCHW", "THWC", "tokens"]
CHANNEL_AXIS = {"CTHW": 1, "TCHW": 2, "THWC": 4, "tokens": 2}
TEXT_WIDTHS = ("caption_channels", "text_embed_dim", "text_dim", "in_text_dim", "cross_attention_dim")  # first set
CHANNELS = ("in_channels", "in_visual_dim")  # the first that is set


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
    changes: it does change along the steps (a second timestep), and only recorded trajectories say how.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    value: float | None = None
    changes: bool = False

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


def even_sigmas(steps: int) -> list[float]:
    """1, 1 - 1/steps, …, 1/steps, as most pipelines of flow-matching models begin."""
    return [1 - step / steps for step in range(steps)]


def nothing(config: Config, size: Size) -> dict[str, Any]:
    """No argument is fixed."""
    return {}


def conditioned(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance; scale 1 is none."""
    return uncond + scale * (cond - uncond)


def as_many(config: Config, frames: int) -> int:
    """The network gets the latent frames there are."""
    return frames


def beside_noise(config: Config) -> int:
    """Channels of hidden_states behind the noise's: those that the network takes and does not return."""
    taken, returned = channels(config), config.get("out_channels")
    return 0 if returned is None else max(0, taken - int(returned))


def seeded(*shape: int) -> torch.Tensor:
    """Normal numbers, the same at each call: in place of an image's latent."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def channels(config: Config) -> int:
    """C, those beside the noise included. Raises ModelError where the configuration does not say."""
    for name in CHANNELS:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ModelError(
        f"the configuration has no number of channels ({', '.join(CHANNELS)})",
        hint="write a factory and give package.module:factory",
    )


@dataclass(frozen=True)
class Family:
    """A transformer class: how it is called, what is published, and what its pipeline takes for granted.

    name: as people say it; class_name: of the transformer in diffusers; pipelines: pipeline classes that use it.
    video: frames, height, width it is made for; None: must be chosen. steps, guidance, text_tokens: the pipeline's
    defaults. scheduler: the published pipeline's configuration, for a transformer folder, which has none.
    temporal, spatial: frames and pixels that one latent element stands for, unless the pipeline's VAE says otherwise;
    first_alone: the first frame is a latent of its own. layout: axes of hidden_states behind the batch.
    integer_time: its timesteps are int64.
    hidden_states(config, size): shape of hidden_states where no layout says it.
    network: makes the class where it is none of diffusers.
    inputs(config, size): tensors beside latent and timestep that no step of a branch changes.
    fixed(config, size): arguments given once for all, constants of the graph.
    beside(config, size): channels that hidden_states has behind the noise's (an image's latent and its mask), by the
    layout; where `times` has zeros, the first latent frame that is given in the noise's place; None: the network is
    conditioned on the inputs alone.
    times(config, size): what a step's t is multiplied with, [1, tokens], where each token has a timestep; None: one for
    all. guided(cond, uncond, scale): the prediction of both branches. frames(config, T): latent frames that the
    network gets of so many, where it takes whole patches and the pipeline fills up.
    sigmas(steps): noise levels that the pipeline gives a flow-matching scheduler; None: the scheduler's own.
    also(config, size): shapes of further latents that are denoised with hidden_states, by input: audio. The network
    then returns all predictions in one row [B, elements], one after the other (prepare() makes it). repeats: arguments
    that a pipeline gives beside an input, always equal to it.
    prepare(network): gives a network whose shapes depend on data (tokens taken out by a mask) a form where they do not,
    in place; parameters keep their names, and the outputs are equal for every mask, which the tests show.
    The settings of the pipeline (boundary_ratio, …; "pipeline": its class) are in `config` too, if there is one.
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
    hidden_states: Callable[[Config, Size], tuple[int, ...]] | None = None
    network: Callable[[], type[torch.nn.Module]] | None = None
    inputs: Callable[[Config, Size], dict[str, Input]] = text
    fixed: Callable[[Config, Size], dict[str, Any]] = nothing
    beside: Callable[[Config, Size], torch.Tensor | None] | None = None
    times: Callable[[Config, Size], torch.Tensor | None] | None = None
    guided: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = conditioned
    frames: Callable[[Config, int], int] = as_many
    sigmas: Callable[[int], list[float]] | None = None
    also: Callable[[Config, Size], dict[str, tuple[int, ...]]] | None = None
    repeats: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[torch.nn.Module], None] | None = None
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
        if self.hidden_states is not None:
            return self.hidden_states(config, size)
        c, t, h, w = channels(config), self.frames(config, size.t), size.h, size.w
        whole = {"CTHW": (c, t, h, w), "TCHW": (t, c, h, w), "THWC": (t, h, w, c), "tokens": (t * h * w, c)}
        return (1, *whole[self.layout])

    @property
    def channel_axis(self) -> int:
        return CHANNEL_AXIS[self.layout]

    def network_class(self) -> type[torch.nn.Module]:
        """The transformer's class. Raises ModelError where the installed diffusers has none of the name."""
        if self.network is not None:
            return self.network()
        import diffusers.models.transformers as transformers

        if not hasattr(transformers, self.class_name):
            raise ModelError(f"the installed diffusers has no {self.class_name}", hint="install a newer diffusers")
        kind: type[torch.nn.Module] = getattr(transformers, self.class_name)
        return kind
