"""How the error grows along a trajectory: a bundle's latents against the float model's, seen while clips are made.

Both denoise the same case, each from what it made itself. What a step is given is the latent that the steps before it
left; at the first step that is the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vdq_export.metrics import bounded, decibels
from vdq_export.model import Step
from vdq_export.report.data import StepError


class Growth:
    """Of one case. Give reference() and then quantized() as a sampler's `observer`; `steps` has the result.

    Looked at are the inputs of the network that its steps change, the timestep apart, in the first guidance branch;
    [..] float arrays of one trajectory are held.
    """

    def __init__(self, timestep_input: str) -> None:
        self._timestep = timestep_input
        self._first: Step | None = None
        self._latents: list[tuple[float, dict[str, torch.Tensor]]] = []
        self._seen = 0
        self.steps: list[StepError] = []

    def reference(self, step: Step) -> None:
        """A call of the float model, before it is made."""
        if self._first is None:
            self._first = {**step, "inputs": {name: tensor.clone() for name, tensor in step["inputs"].items()}}
            return
        if step["branch"] == self._first["branch"] and step["t"] != self._first["t"]:
            first = self._first["inputs"]
            changed = {name: x for name, x in step["inputs"].items() if self._counts(name, x, first.get(name))}
            self._latents.append((step["t"], {name: tensor.clone() for name, tensor in changed.items()}))

    def quantized(self, step: Step) -> None:
        """The same call with the bundle in the float model's place."""
        first = self._first
        if first is None or step["branch"] != first["branch"] or step["t"] == first["t"]:
            return
        if self._seen < len(self._latents):
            t, expected = self._latents[self._seen]
            self._seen += 1
            found = {name: tensor for name, tensor in step["inputs"].items() if name in expected}
            if t == step["t"] and found.keys() == expected.keys():
                self.steps.append(StepError(t=t, sqnr_db=_sqnr_db(expected, found)))

    def _counts(self, name: str, tensor: torch.Tensor, first: torch.Tensor | None) -> bool:
        if name == self._timestep or not tensor.is_floating_point() or first is None:
            return False
        return tensor.shape == first.shape and not torch.equal(tensor, first)


def _sqnr_db(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Over all of them together. Latents that are no numbers any more are infinitely far off."""
    signal = sum(float(x.double().square().sum()) for x in expected.values())
    noise = sum(float((x.double() - found[name].double()).square().sum()) for name, x in expected.items())
    return bounded(decibels(signal, noise) if math.isfinite(noise) else float("nan"))


def mean(clips: Sequence[Iterable[StepError]]) -> tuple[StepError, ...]:
    """The mean over clips of each step's decibels, in the order of the steps; () without clips."""
    found: dict[float, list[float]] = {}
    for clip in clips:
        for one in clip:
            found.setdefault(one.t, []).append(one.sqnr_db)
    return tuple(StepError(t=t, sqnr_db=float(np.mean(numbers))) for t, numbers in found.items())
