"""How good a recipe really is: export it into a temporary folder and compare with the float model.

With a sampler: mean PSNR of a few whole clips. Without: signal-to-quantization-noise ratio of the network's output over
one recorded trajectory, which calibration then does not see, unless there is only one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import numpy as np

from vdq_export import compiler
from vdq_export.errors import ModelError
from vdq_export.graph import Array, Graph
from vdq_export.metrics import decibels, psnr_db
from vdq_export.model import Model, Trajectory, first_tensor
from vdq_export.recipe import Recipe
from vdq_export.runtime import load

FIRST_CASE = 20_000  # cases nobody calibrates on (samples: from 10000) and nobody reports (verify: from 0)
LIMIT_DB = 200.0  # of equal clips


@dataclass
class Meter:
    """Measures recipes on one model, with one calibration record and one set of choices for compiler.export().

    `model` is what is to be exported; the one that comes back from calibrated() is what to calibrate on.
    """

    model: Model
    folder: Path
    record: Path
    traced: Mapping[str, Graph]
    choices: Mapping[str, Any]
    clips: int = 2
    blind: bool = True  # the record was made from calibrated(model)
    _reference: list[Array] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def how(self) -> str:
        """What the decibels are."""
        if self.model.sampler is not None:
            return f"mean PSNR of {self.clips} clips"
        seen = "" if self.blind and held_out(self.model)[1] is not None else ", perhaps calibrated on too"
        return f"SQNR of the output over one trajectory{seen}"

    def __call__(self, recipe: Recipe) -> float:
        """dB, at most LIMIT_DB. Raises what compiler.export() raises."""
        out = self.folder / f"trial{next(self._count)}"
        traced = {expert: graph.copy() for expert, graph in self.traced.items()}
        choices = {**self.choices, "calibration": self.record, "traced": traced, "page": False}
        compiler.export(calibrated(self.model), recipe=recipe, out=out, **choices)
        found = self._clips(out) if self.model.sampler is not None else self._outputs(out)
        return float(np.clip(found, -LIMIT_DB, LIMIT_DB))

    def _clips(self, bundle: Path) -> float:
        cases = range(FIRST_CASE, FIRST_CASE + self.clips)
        if not self._reference:
            self._reference = [self.model.clip(self.model.module, case) for case in cases]
        with load(bundle) as transformer:
            made = [self.model.clip(transformer, case) for case in cases]
        pairs = zip(self._reference, made, strict=True)
        return float(np.mean([min(psnr_db(a, b), LIMIT_DB) for a, b in pairs]))

    def _outputs(self, bundle: Path) -> float:
        kept, last = held_out(self.model)
        steps = last if last is not None else kept
        signal = noise = 0.0
        with load(bundle) as transformer:
            for step in steps:
                exact = self.model(**step["inputs"]).numpy()
                inputs: dict[str, Any] = dict(step["inputs"])
                with transformer.cache_context(step["branch"]):
                    made = first_tensor(transformer(**inputs)).numpy()
                signal += float(np.square(exact, dtype=np.float64).sum())
                noise += float(np.square(np.subtract(exact, made, dtype=np.float64)).sum())
        return decibels(signal, noise)


def calibrated(model: Model) -> Model:
    """`model` with the trajectories that may be calibrated on."""
    if model.sampler is not None or held_out(model)[1] is None:
        return model
    return with_changes(model, trajectories=lambda: list(model.iter_trajectories())[:-1])


def held_out(model: Model) -> tuple[Trajectory, Trajectory | None]:
    """(the first trajectory, the last one where there is another). Raises ModelError without any."""
    first = last = None
    for trajectory in model.iter_trajectories():
        if first is None:
            first = list(trajectory)
        else:
            last = trajectory
    if first is None:
        raise ModelError(f"{model.name} brings no trajectories", hint="measuring needs at least one")
    return first, None if last is None else list(last)
