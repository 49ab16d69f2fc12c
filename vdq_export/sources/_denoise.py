"""Denoising with the float model itself, as its pipeline does: for calibration, for recording, and for whole clips.

Shapes: see _shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vdq_export.errors import ModelError
from vdq_export.model import Denoiser, Step, Trajectory, first_tensor
from vdq_export.sources._embeddings import Prompt, inputs
from vdq_export.sources._scheduling import Scheduler
from vdq_export.sources._shapes import Call

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
        """The latent that `network` denoises noise of `seed` to; `observer` sees each call before it is made.

        Raises ModelError when the network cannot be called so, and for NaN and Inf.
        """
        generator = torch.Generator().manual_seed(seed)
        scheduler = self.scheduler.fresh()
        latent = torch.randn(self.call.latent, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        original: Any = None  # what a two-step DPM solver remembers of the step before
        timesteps = self.scheduler.timesteps
        for index, t in enumerate(timesteps):
            seen = scheduler.scale_model_input(latent, t) if hasattr(scheduler, "scale_model_input") else latent
            predicted = {}
            for branch in self.guidance.branches:
                given = inputs(self.call, seen, t, self.prompts[prompt][branch])
                if observer is not None:
                    observer({"t": float(t), "branch": branch, "inputs": given})
                predicted[branch] = self._predict(network, given, branch)
            noise = predicted["cond"]
            if "uncond" in predicted:
                noise = predicted["uncond"] + self.guidance.at(float(t)) * (noise - predicted["uncond"])
            random: dict[str, Any] = {"generator": generator} if self._draws else {}
            if self.scheduler.name == "CogVideoXDPMScheduler":
                before = timesteps[index - 1] if index else None
                latent, original = scheduler.step(noise, original, t, before, latent, **random, return_dict=False)
            else:
                latent = scheduler.step(noise, t, latent, **random, return_dict=False)[0]
            if not torch.isfinite(latent).all():
                raise ModelError(f"denoising gave NaN or Inf at t = {float(t):g}", hint="check weights and scheduler")
        return latent

    def trajectory(self, network: Denoiser, number: int) -> Trajectory:
        """Every call that is made for prompt `number`."""
        steps: list[Step] = []
        self.run(network, number, self.seed + number, steps.append)
        return steps

    def settings(self) -> dict[str, Any]:
        """What graphs of this loop are made for."""
        low = {} if self.guidance.low is None else {"guidance_2": self.guidance.low}
        return {"name": self.scheduler.name, "steps": self.scheduler.steps, "guidance": self.guidance.scale, **low}

    def _predict(self, network: Denoiser, given: Mapping[str, torch.Tensor], branch: Branch) -> torch.Tensor:
        """The network's answer; of one that also returns variances, the first half of the channels."""
        try:
            with _told(network, branch), torch.no_grad():
                output = first_tensor(network(**given)).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"the network fails when it is called with {', '.join(given)}: {why}",
                hint="choose other sizes, or write a factory and give package.module:factory",
            ) from error
        axis, channels = self.call.channel_axis, self.call.latent[self.call.channel_axis]
        if output.shape[axis] == 2 * channels:
            output = output.narrow(axis, 0, channels)
        if tuple(output.shape) != self.call.latent:
            raise ModelError(
                f"the network returned {list(output.shape)} for a latent of {list(self.call.latent)}",
                hint="write a factory and give package.module:factory",
            )
        return output


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

    def __iter__(self) -> Iterator[Trajectory]:
        for number in range(len(self)):
            if number not in self._made:
                self._made[number] = self.loop.trajectory(self.network, number)
            yield self._made[number]
