"""Several networks that take turns along the denoising: which one serves a timestep, and a module that asks it.

A range t = (lo, hi) holds lo <= t < hi; the highest expert serves its hi as well. Wan2.2's rule is the same: a timestep
at or above the boundary is the high-noise expert's.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.weights.checkpoint import Checkpoint
from vdq_export.weights.learned import Learned

_NAME = re.compile(r"[a-z][a-z0-9_-]*")  # it becomes a part of file and plan names, between dots


@dataclass(frozen=True, eq=False)
class Expert:
    """One network and the timesteps it serves; checkpoint, make, learned: as a Model's.

    Raises ModelError for a name or range that cannot be.
    """

    name: str
    module: torch.nn.Module
    t: tuple[float, float]
    checkpoint: Checkpoint | None = None
    make: Callable[[], torch.nn.Module] | None = None
    learned: Learned | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ModelError(
                f"an expert cannot be called {self.name!r}", hint="small letters, digits, - and _, a letter first"
            )
        lo, hi = self.t
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise ModelError(f"expert {self.name} holds no timestep: [{lo}, {hi})", hint="give t as (lo, hi), lo < hi")


class Experts(torch.nn.Module):
    """Calls the expert of the timestep it is given, like the experts themselves are called.

    experts: in any order; kept as denoising goes, highest timesteps first. timestep_input: the argument that carries t:
    [], [1], [B] or [B, …], where a sample's highest decides, as at run time. Raises ModelError for no expert at all, a
    name given twice, and ranges that overlap; gaps are allowed, a call with a timestep in one is not.
    """

    def __init__(self, experts: Sequence[Expert], timestep_input: str = "timestep") -> None:
        super().__init__()
        if not experts:
            raise ModelError("a model of experts has none", hint="name at least one")
        self.experts = tuple(sorted(experts, key=lambda one: one.t, reverse=True))
        names = [one.name for one in self.experts]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ModelError(f"two experts are called {doubled[0]}")
        for upper, lower in pairwise(self.experts):
            if upper.t[0] < lower.t[1]:
                raise ModelError(
                    f"experts {upper.name} and {lower.name} both serve t = {upper.t[0]:g}",
                    hint="ranges are half open: let one end where the next begins",
                )
        self.timestep_input = timestep_input
        try:
            self.networks = torch.nn.ModuleDict({one.name: one.module for one in self.experts})
        except KeyError as error:  # names of torch's own, like "half"
            raise ModelError(f"an expert cannot be called so: {error.args[0]}") from error

    def forward(self, *values: Any, **named: Any) -> Any:
        """What the expert of the timestep returns. Raises ModelError where none or more than one would serve."""
        steps = self._timesteps(values, named)
        serving = {one.name: one for one in map(self.serving, steps)}
        if len(serving) != 1:
            raise ModelError(
                f"timesteps {', '.join(f'{t:g}' for t in steps)} in one call are of experts {' and '.join(serving)}",
                hint="call with the samples of one expert at a time",
            )
        (one,) = serving.values()
        return one.module(*values, **named)

    def serving(self, t: float) -> Expert:
        """The expert of timestep `t`. Raises ModelError when there is none."""
        for one in self.experts:
            lo, hi = one.t
            if lo <= t < hi or (t == hi and one is self.experts[0]):
                return one
        raise ModelError(
            f"no expert serves t = {t:g} ({self.ranges()})", hint="let the experts' ranges cover every timestep"
        )

    def limits(self, name: str) -> tuple[float | None, float | None]:
        """Ends (lo, hi) of an expert's range beyond which another one serves; None where none does."""
        for one in self.experts:
            if one.name == name:
                return None if one is self.experts[-1] else one.t[0], None if one is self.experts[0] else one.t[1]
        raise ModelError(f"there is no expert {name!r}", hint=f"there are {', '.join(e.name for e in self.experts)}")

    def ranges(self) -> str:
        """All ranges, for messages: "high [700, 1000], low [0, 700)"."""
        return ", ".join(
            f"{one.name} [{one.t[0]:g}, {one.t[1]:g}{']' if one is self.experts[0] else ')'}" for one in self.experts
        )

    def _timesteps(self, values: Sequence[Any], named: dict[str, Any]) -> list[float]:
        """Distinct timesteps of a call's samples, falling."""
        given = named.get(self.timestep_input)
        if given is None:
            bound = inspect.signature(self.experts[0].module.forward).bind_partial(*values)
            given = bound.arguments.get(self.timestep_input)
        if given is None:
            raise ModelError(
                f"called without {self.timestep_input!r}, by which the experts are told apart",
                hint="give it, or set timestep_input",
            )
        t = torch.as_tensor(given)
        per_sample = t.flatten(1).amax(1) if t.ndim > 1 else t.flatten()
        return sorted(set(per_sample.tolist()), reverse=True)
