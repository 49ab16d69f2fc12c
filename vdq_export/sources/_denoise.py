"""Denoising with the float model itself, as its pipeline does: for calibration, for recording, and for whole clips.

Shapes: see _shapes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch

from vdq_export.errors import ModelError
from vdq_export.model import Denoiser, Step, Trajectory, first_tensor
from vdq_export.sources._embeddings import inputs
from vdq_export.sources._scheduling import Scheduler
from vdq_export.sources._shapes import Call
from vdq_export.sources._text import Prompt

Branch = Literal["cond", "uncond"]


@dataclass(frozen=True)
class Guidance:
    """Scale of classifier-free guidance; `low` below the timestep `boundary`, where another expert serves.

    At 1 or less only the branch "cond" is called. Embedded guidance is an input instead, see _embeddings.
    """

    scale: float
    low: float | None = None
    boundary: float = 0.0

    def at(self, t: float) -> float:
        return self.scale if self.low is None or t >= self.boundary else self.low

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("cond", "uncond") if self.scale > 1 else ("cond",)


class Loop:
    """A pipeline's denoising loop. seed: of the first prompt's noise; the others' follow it."""

    def __init__(
        self, call: Call, scheduler: Scheduler, prompts: Sequence[Prompt], guidance: Guidance, seed: int = 0
    ) -> None:
        self.call, self.scheduler, self.prompts, self.guidance, self.seed = call, scheduler, prompts, guidance, seed
        self._draws = "generator" in inspect.signature(scheduler.fresh().step).parameters

    def run(
        self, network: Denoiser, prompt: int, seed: int, observer: Callable[[Step], None] | None = None
    ) -> torch.Tensor:
        """The video's latent that `network` denoises noise of `seed` to; `observer` sees each call before it is made.

        Raises ModelError when the network cannot be called so, and for NaN and Inf.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = {
            name: _Part(self.scheduler.fresh(), torch.randn(shape, generator=generator), self.scheduler, self._draws)
            for name, shape in self.call.latents.items()
        }
        for index, t in enumerate(self.scheduler.timesteps):
            seen = {name: part.seen(t) for name, part in parts.items()}
            predicted = {}
            for branch in self.guidance.branches:
                given = inputs(self.call, seen, t, self.prompts[prompt][branch])
                if observer is not None:
                    observer({"t": float(t), "branch": branch, "inputs": given})
                predicted[branch] = self._predict(network, given, branch)
            for name, part in parts.items():
                noise = predicted["cond"][name]
                if "uncond" in predicted:
                    scale = self.guidance.at(float(t))
                    noise = self.call.family.guided(noise, predicted["uncond"][name], scale)
                part.step(noise, index, generator)
        return parts["hidden_states"].latent

    def trajectory(
        self, network: Denoiser, number: int, begun: Callable[[int], None] = lambda calls: None
    ) -> Trajectory:
        """Every call that is made for prompt `number`. begun: told how many were made, before each further one."""
        steps: list[Step] = []

        def keep(step: Step) -> None:
            begun(len(steps))
            steps.append(step)

        self.run(network, number, self.seed + number, keep)
        return steps

    def settings(self) -> dict[str, Any]:
        """What graphs of this loop are made for."""
        low = {} if self.guidance.low is None else {"guidance_2": self.guidance.low}
        return {"name": self.scheduler.name, "steps": self.scheduler.steps, "guidance": self.guidance.scale, **low}

    def key(self, number: int) -> str:
        """sha256 over what the trajectory of prompt `number` follows from, beside the network."""
        call, scheduler = self.call, self.scheduler
        digest = hashlib.sha256(
            repr((call.latents, call.size, sorted(self.settings().items()), self.seed + number)).encode()
        )
        digest.update(repr((scheduler.name, sorted(scheduler.config.items(), key=str))).encode())
        prompt = self.prompts[number]
        tensors = {f"{branch}.{name}": tensor for branch, text in prompt.items() for name, tensor in text.items()}
        tensors |= {"beside": call.beside} if call.beside is not None else {}
        tensors |= {name: one.make() for name, one in call.inputs.items() if one.value is not None}
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _predict(self, network: Denoiser, given: Mapping[str, torch.Tensor], branch: Branch) -> dict[str, torch.Tensor]:
        """The network's answer for each latent; of one that also returns variances, the first half of the channels."""
        try:
            with _told(network, branch), torch.no_grad():
                answer = network(**given)
            if isinstance(answer, tuple) and len(self.call.latents) == len(answer) > 1:  # a bundle's, one for each
                return {name: one.float() for name, one in zip(self.call.latents, answer, strict=True)}
            output = first_tensor(answer).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"the network fails when it is called with {', '.join(given)}: {why}",
                hint="choose other sizes, or write a factory and give package.module:factory",
            ) from error
        latents, axis = self.call.latents, self.call.channel_axis
        if len(latents) > 1:  # one row, one after the other
            ends = list(accumulate(torch.Size(shape).numel() for shape in latents.values()))
            if tuple(output.shape) == (1, ends[-1]):
                parts = zip(latents.items(), (0, *ends), ends, strict=False)
                return {name: output[:, start:end].reshape(shape) for (name, shape), start, end in parts}
        elif output.ndim > axis and output.shape[axis] == 2 * self.call.latent[axis]:
            output = output.narrow(axis, 0, self.call.latent[axis])
        if tuple(output.shape) != self.call.latent:
            raise ModelError(
                f"the network returned {list(output.shape)} for a latent of {list(self.call.latent)}",
                hint="write a factory and give package.module:factory",
            )
        return {"hidden_states": output}


@dataclass
class _Part:
    """One latent and the scheduler that steps it."""

    scheduler: Any
    latent: torch.Tensor
    settings: Scheduler
    draws: bool
    original: Any = None  # what a two-step DPM solver remembers of the step before

    def __post_init__(self) -> None:
        self.latent = self.latent * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def seen(self, t: torch.Tensor) -> torch.Tensor:
        """The latent as the network gets it."""
        scaled = getattr(self.scheduler, "scale_model_input", None)
        found: torch.Tensor = self.latent if scaled is None else scaled(self.latent, t)
        return found

    def step(self, noise: torch.Tensor, index: int, generator: torch.Generator) -> None:
        """Step number `index`. Raises ModelError for NaN and Inf."""
        t, latent = self.settings.timesteps[index], self.latent
        random: dict[str, Any] = {"generator": generator} if self.draws else {}
        if self.settings.name == "CogVideoXDPMScheduler":
            before = self.settings.timesteps[index - 1] if index else None
            made = self.scheduler.step(noise, self.original, t, before, latent, **random, return_dict=False)
            self.latent, self.original = made
        else:
            self.latent = self.scheduler.step(noise, t, latent, **random, return_dict=False)[0]
        if not torch.isfinite(self.latent).all():
            raise ModelError(f"denoising gave NaN or Inf at t = {float(t):g}", hint="check weights and scheduler")


def _told(network: Denoiser, branch: Branch) -> AbstractContextManager[Any]:
    """Tells the branch to a network that asks for it, as our runtime does."""
    context = getattr(network, "cache_context", None)
    return nullcontext() if context is None else context(branch)


class Generated:
    """Trajectories that `network` itself denoises, one a prompt, from noise of fixed seeds; kept once made."""

    def __init__(self, network: Denoiser, loop: Loop) -> None:
        self.network, self.loop = network, loop
        self._made: dict[int, Trajectory] = {}

    def __len__(self) -> int:
        return len(self.loop.prompts)

    def keys(self) -> tuple[str, ...]:
        """What each trajectory depends on beside the network's weights."""
        return tuple(self.loop.key(number) for number in range(len(self)))

    def __getitem__(self, number: int) -> Trajectory:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number not in self._made:
            self._made[number] = self.loop.trajectory(self.network, number)
        return self._made[number]

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(len(self)))
