"""Tiny diffusers pipelines: each family's own class with random weights, so that a bundle can stand in for the network.

Nothing is downloaded and no text encoder is loaded: embeddings are given. A pipeline is saved as save_pretrained() does
it, the folder exported, and the bundle put where the pipeline has its transformer(s).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from vdq_export.metrics import sqnr_db

NETWORKS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Case:
    """A pipeline and one call of it.

    name: what it shows. pipeline: diffusers class. network: builds the transformer of a seed. vae, scheduler: build
    these. size: frames, height, width in pixels. text: shape of the embeddings, [1, L, D]. experts: networks, 1 or 2.
    settings: more arguments of the class; parts: more components (not saved); call: more arguments of the call.
    masked: the call wants masks of the prompts. options: more of those that the export takes.
    """

    name: str
    pipeline: str
    network: Callable[[int], torch.nn.Module]
    vae: Callable[[], Any]
    scheduler: Callable[[], Any]
    size: tuple[int, int, int]
    text: tuple[int, ...] = (1, 8, 32)
    experts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False
    guidance: float = 2.0
    steps: int = 3
    options: Mapping[str, object] = field(default_factory=dict)

    def spec(self, folder: Path) -> str:
        """The MODEL argument of the folder at this size."""
        frames, height, width = self.size
        chosen = {"frames": frames, "height": height, "width": width, "steps": self.steps, "guidance": self.guidance}
        return f"{folder}?" + "&".join(f"{name}={value}" for name, value in {**chosen, **self.options}.items())


def sensible(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights as trained networks have them, in size: linears N(0, 1/K), norms 1 ± 10 %, tables ± 0.3, biases ± 0.1.

    With diffusers' own initialisation gates and last layers are near zero: blocks add nothing, and their noise hides.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise(parameter))
            elif "table" in name or "pos_" in name:
                parameter.copy_(0.3 * noise(parameter))
            else:
                parameter.copy_(noise(parameter) * parameter[0].numel() ** -0.5)
    return network.eval()


def build(case: Case) -> Any:
    """The pipeline, its components random and the same at each call."""
    kind = getattr(diffusers, case.pipeline)
    torch.manual_seed(7)
    made = {"vae": case.vae().eval(), "scheduler": case.scheduler(), **case.parts, **case.settings}
    made |= {name: case.network(seed) for seed, name in enumerate(NETWORKS[: case.experts])}
    wanted = list(inspect.signature(kind.__init__).parameters.values())[1:]
    pipe = kind(**{p.name: made[p.name] if p.name in made else _default(p) for p in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default


def save(pipe: Any, case: Case, folder: Path) -> Path:
    """The folder as diffusers writes it, without components of this test."""
    pipe.register_modules(**dict.fromkeys(case.parts))
    with _quiet():
        pipe.save_pretrained(folder)
    pipe.register_modules(**case.parts)
    return folder


@dataclass(frozen=True)
class Played:
    """What a pipeline made: the latents that its VAE was given and the video [F, 3, H, W] in [0, 1]."""

    latents: np.ndarray[Any, Any]
    video: np.ndarray[Any, Any]

    def sqnr_db(self, other: Played) -> float:
        """Of `other`'s latents, against these."""
        return sqnr_db(self.latents, other.latents)


def play(pipe: Any, case: Case, seed: int = 3) -> Played:
    """One video from random embeddings and noise of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = case.size
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(case.text, generator=generator),
        "negative_prompt": None,  # the default of some is "", which would be encoded
        "negative_prompt_embeds": torch.randn(case.text, generator=generator),
        "height": height,
        "width": width,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "generator": generator,
        "output_type": "pt",
    }
    names = inspect.signature(type(pipe).__call__).parameters
    call["video_length" if "video_length" in names else "num_frames"] = frames
    if case.masked:
        for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
            call[name] = torch.ones(case.text[:2], dtype=torch.int64)
    with _watched(pipe.vae) as given, _quiet():
        video = pipe(**{name: value for name, value in {**call, **case.call}.items() if name in names}).frames[0]
    assert len(given) == 1, "the VAE decodes once"
    return Played(given[0], np.asarray(video))


def swap(pipe: Any, network: Any) -> None:
    """Put `network` where the pipeline has its transformer, or both."""
    for name in NETWORKS:
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, network)


@contextmanager
def _watched(vae: Any) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The latents that the VAE is asked to decode."""
    seen: list[np.ndarray[Any, Any]] = []
    decode = vae.decode

    def watching(latents: torch.Tensor, *values: Any, **named: Any) -> Any:
        seen.append(latents.numpy().copy())
        return decode(latents, *values, **named)

    vae.decode = watching
    try:
        yield seen
    finally:
        vae.decode = decode


@contextmanager
def _quiet() -> Iterator[None]:
    """diffusers warns of components that are not there."""
    logger = logging.getLogger("diffusers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def names(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]
