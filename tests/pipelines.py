"""Tiny diffusers pipelines: each family's own class with random weights, so that a bundle can stand in for the network.

Nothing is downloaded and no text encoder is loaded: embeddings are given. A pipeline is saved as save_pretrained() does
it, the folder exported, and the bundle put where the pipeline has its transformer(s).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from tests.families import tiny_of
from vdq_export.metrics import sqnr_db
from vdq_export.sources.families import Family, Tiny

NETWORKS = ("transformer", "transformer_2")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A pipeline and one call of it.

    name: what it shows. tiny: name of the network's configuration in tests.families. pipeline: diffusers class. vae,
    scheduler: build these. experts: networks, 1 or 2. settings: more arguments of the class; parts: build more
    components (not saved); call: more arguments of the call, functions of a generator where they are random. masks:
    names of the call's masks of the prompts. options: more of those that the export takes.
    """

    name: str
    tiny: str
    pipeline: str
    vae: Callable[[], Any]
    scheduler: Callable[[], Any]
    experts: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    guidance: float = 2.0
    steps: int = 3
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return tiny_of(self.tiny)[0]

    @property
    def configuration(self) -> Tiny:
        return tiny_of(self.tiny)[1]

    @property
    def calls(self) -> int:
        """Of the network in one video: both branches in one call, or one after the other."""
        together = self.pipeline.startswith(("CogVideoX", "Latte", "Allegro", "LTX", "Mochi"))
        return self.steps * (1 if together or self.guidance <= 1 else 2)

    def spec(self, folder: Path) -> str:
        """The MODEL argument of the folder at this size, with embeddings beside it."""
        frames, height, width = self.configuration.video
        chosen: dict[str, object] = {
            "frames": frames, "height": height, "width": width, "steps": self.steps, "guidance": self.guidance,
            "prompt_embeds": folder.with_suffix(".safetensors"), **self.options,
        }  # fmt: skip
        return f"{folder}?" + "&".join(f"{name}={value}" for name, value in chosen.items())


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
    kind, settings = getattr(diffusers, case.pipeline), case.configuration.settings
    torch.manual_seed(7)
    made = {"vae": case.vae().eval(), "scheduler": case.scheduler(), **case.settings}
    made |= {name: part() for name, part in case.parts.items()}
    for seed, name in enumerate(NETWORKS[: case.experts]):
        made[name] = sensible(case.family.network_class()(**settings), seed)
    wanted = list(inspect.signature(kind.__init__).parameters.values())[1:]
    pipe = kind(**{p.name: made[p.name] if p.name in made else _default(p) for p in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default


def save(pipe: Any, case: Case, folder: Path) -> Path:
    """The folder as diffusers writes it, without components of this test; beside it embeddings of two prompts."""
    parts = {name: getattr(pipe, name) for name in case.parts}
    pipe.register_modules(**dict.fromkeys(parts))
    with _quiet():
        pipe.save_pretrained(folder)
    pipe.register_modules(**parts)
    held = [inputs(pipe, case, seed) for seed in (1, 2)]
    save_file({name: torch.cat([one[name] for one in held]) for name in held[0]}, folder.with_suffix(".safetensors"))
    return folder


def inputs(pipe: Any, case: Case, seed: int) -> dict[str, torch.Tensor]:
    """What the float pipeline's first call of its network is given beside latent and timestep, by names of files.

    The negative prompt's are in the second call, or in the first half of the first one's batch; an image is of both.
    """
    calls: list[Mapping[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, values, named: calls.append(named), with_kwargs=True)
    try:
        play(pipe, case, seed)
    finally:
        hook.remove()
    first, second = calls[0], calls[1]
    batched = first["hidden_states"].shape[0] == 2
    size = case.family.size(case.configuration.video, case.configuration.tokens)
    found: dict[str, torch.Tensor] = {}
    for name, wanted in case.family.inputs(pipe.transformer.config, size).items():
        if wanted.value is None or "mask" in name:
            file = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
            cond = first[name][-1:]
            found[file.get(name, name)] = cond.reshape(1, -1, cond.shape[-1]) if wanted.value is None else cond
            uncond = first[name][:1] if batched else second[name][:1]
            if case.guidance > 1 and ("mask" in name or not torch.equal(uncond, cond)):
                found[f"negative_{file.get(name, name)}"] = uncond.reshape(found[file.get(name, name)].shape)
    config = {**case.settings, "pipeline": case.pipeline, **pipe.transformer.config}
    beside = case.family.beside and case.family.beside(config, size)
    if beside is not None:  # further channels, or the first frame
        seen, axis = first["hidden_states"][-1:], case.family.channel_axis
        alike = beside.shape[axis] == seen.shape[axis]
        found["image_latents"] = seen[:, :, :1] if alike else seen.narrow(axis, -beside.shape[axis], beside.shape[axis])
    return {name: tensor.contiguous() for name, tensor in found.items()}


@dataclass(frozen=True)
class Played:
    """What a pipeline made: the latents that its VAE was given and the video [F, 3, H, W] in [0, 1]."""

    latents: Array
    video: Array

    def sqnr_db(self, other: Played) -> float:
        """Of `other`'s latents, against these."""
        return sqnr_db(self.latents, other.latents)


def play(pipe: Any, case: Case, seed: int = 3) -> Played:
    """One video from random embeddings and noise of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    (frames, height, width), tokens = case.configuration.video, case.configuration.tokens
    shape = case.family.inputs(case.configuration.settings, case.family.size((frames, height, width), tokens))
    text = (1, *shape["encoder_hidden_states"].shape[-2:])
    call: dict[str, Any] = {
        "prompt_embeds": torch.randn(text, generator=generator),
        "negative_prompt": None,  # the default of some is "", which would be encoded
        "negative_prompt_embeds": torch.randn(text, generator=generator),
        "height": height,
        "width": width,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance,
        "output_type": "pt",
        **dict.fromkeys(case.masks, torch.ones(text[:2], dtype=torch.int64)),
    }
    call |= {name: value(generator) if callable(value) else value for name, value in case.call.items()}
    names = inspect.signature(type(pipe).__call__).parameters
    call |= {"generator": generator, "video_length" if "video_length" in names else "num_frames": frames}
    with _watched(pipe.vae) as given, _quiet():
        video = pipe(**{name: value for name, value in call.items() if name in names}).frames[0]
    assert len(given) == 1, "the VAE decodes once"
    return Played(given[0], np.asarray(video))


def swap(pipe: Any, network: Any) -> None:
    """Put `network` where the pipeline has its transformer, or both."""
    for name in NETWORKS:
        if getattr(pipe, name, None) is not None:
            setattr(pipe, name, network)


@contextmanager
def _watched(vae: Any) -> Iterator[list[Array]]:
    """The latents that the VAE is asked to decode."""
    seen: list[Array] = []
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
