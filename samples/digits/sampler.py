"""The sample's denoising loop: flow-matching Euler steps with a shifted schedule and classifier-free guidance.

Each step calls the denoiser twice with a batch of one (conditional, then unconditional), as pipelines do that switch
graphs by guidance branch. Cases number (prompt, seed) pairs: 0 … 9999 are for evaluation, from 10000 on for
calibration, so what is compared was never calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from vdq_export.model import Denoiser, Step, first_tensor
from vdq_export.samples.digits.data import FRAMES, SIZE, TEXT_DIM, TOKENS, Condition, all_conditions, embed

CALIBRATION = 10_000  # the first calibration case
Branch = Literal["cond", "uncond"]


def case_condition(case: int) -> Condition:
    """The prompt of a case; 80 successive cases ask for each of the 80 conditions once. Raises ValueError below 0."""
    if case < 0:
        raise ValueError(f"case {case}: cases count from 0")
    conditions = all_conditions()
    # 37 is coprime to 80, and a few successive cases already differ in digit, direction and speed.
    return conditions[case * 37 % len(conditions)]


def case_noise(case: int) -> torch.Tensor:
    """[1, 1, F, H, W] standard normal noise of a case, the same on every machine."""
    generator = np.random.Generator(np.random.PCG64([2026, case]))
    return torch.from_numpy(generator.standard_normal((1, *DigitsSampler.shape)).astype(np.float32))


class DigitsSampler:
    """vdq_export.model.Sampler of the sample. `shape` is one clip's, `prompt_shape` one embedded prompt's."""

    shape = (1, FRAMES, SIZE, SIZE)
    prompt_shape = (TOKENS, TEXT_DIM)

    def __init__(self, steps: int = 20, shift: float = 2.0, guidance: float = 3.0) -> None:
        """guidance: 1 is the conditional prediction alone (both branches are called all the same)."""
        self.steps, self.shift, self.guidance = steps, shift, guidance

    @property
    def sigmas(self) -> np.ndarray:
        """[steps + 1] noise levels from 1 to 0: s' = shift·s / (1 + (shift − 1)·s) of even s."""
        even = np.linspace(1.0, 0.0, self.steps + 1)
        shifted: np.ndarray = self.shift * even / (1 + (self.shift - 1) * even)
        return shifted

    def generate(self, denoiser: Denoiser, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        """Clip number `case`, [1, F, H, W] in [0, 1]; `observer` sees each call before it is made.

        denoiser: called as denoiser(hidden_states=, timestep=, encoder_hidden_states=); one that has a `cache_context`
        (as diffusers' transformers and our runtime do) is told the branch through it.
        """
        return self.generate_many(denoiser, [case], 1, observer)[0]

    def generate_many(
        self, denoiser: Denoiser, cases: Sequence[int], batch: int, observer: Callable[[Step], None] | None = None
    ) -> list[np.ndarray]:
        """The clips of `cases`, `batch` at a time; a denoiser of static shape takes batch 1 only."""
        clips: list[np.ndarray] = []
        for first in range(0, len(cases), batch):
            clips.extend(self._generate_batch(denoiser, cases[first : first + batch], observer))
        return clips

    def _generate_batch(
        self, denoiser: Denoiser, cases: Sequence[int], observer: Callable[[Step], None] | None
    ) -> Iterator[np.ndarray]:
        latents = torch.cat([case_noise(case) for case in cases])
        prompts: dict[Branch, torch.Tensor] = {
            "cond": torch.stack([embed(case_condition(case).text) for case in cases]),
            "uncond": embed(None).expand(len(cases), -1, -1).contiguous(),
        }
        sigmas = self.sigmas
        for sigma, following in pairwise(sigmas):
            timestep = torch.full((len(cases),), 1000 * sigma, dtype=torch.float32)
            predicted = {}
            for branch, prompt in prompts.items():
                inputs = {"hidden_states": latents, "timestep": timestep, "encoder_hidden_states": prompt}
                if observer is not None:
                    observer({"t": float(timestep[0]), "branch": branch, "inputs": inputs})
                with _branch_context(denoiser, branch), torch.no_grad():
                    predicted[branch] = first_tensor(denoiser(**inputs)).float()
            velocity = predicted["uncond"] + self.guidance * (predicted["cond"] - predicted["uncond"])
            latents = latents + float(following - sigma) * velocity
        yield from (latents / 2 + 0.5).clamp(0, 1).numpy()

    def describe(self, case: int) -> str:
        return f"case {case}: {case_condition(case).text}"

    def settings(self) -> dict[str, Any]:
        """What the schedule is calibrated for."""
        return {"name": "flow-euler", "steps": self.steps, "shift": self.shift, "guidance": self.guidance}


def _branch_context(denoiser: Denoiser, branch: Branch) -> AbstractContextManager[Any]:
    context = getattr(denoiser, "cache_context", None)
    return nullcontext() if context is None else context(branch)
