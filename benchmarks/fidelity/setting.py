"""What a seed is: a sample with its own calibration cases and evaluation cases, and what is kept of both on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import WORK
from vdq_export import sources
from vdq_export.calib.observe import observe
from vdq_export.graph import Graph
from vdq_export.model import Model, Step, Trajectory
from vdq_export.trace import trace

FOLDER = WORK / "fidelity"
CALIBRATION, EVALUATION = 10_000, 0  # first cases of seed 0; the samples keep the two apart at 10 000
CALIBRATION_STRIDE, EVALUATION_STRIDE = 1000, 200  # from seed to seed
BATCH = 20  # clips the float model makes at once

Clip = np.ndarray[Any, Any]
Denoiser = Callable[..., Any]


class Runs:
    """Trajectories of the cases first … first + count − 1, made when asked for. Re-iterable."""

    def __init__(self, model: Model, first: int, count: int) -> None:
        self._model, self._cases = model, range(first, first + count)

    def __len__(self) -> int:
        return len(self._cases)

    def __iter__(self) -> Iterator[Trajectory]:
        assert self._model.sampler is not None
        for case in self._cases:
            steps: list[Step] = []
            self._model.sampler.generate(self._model.module, case, steps.append)
            yield steps


@dataclass(frozen=True)
class Setting:
    """sample: a source, as "sample:digits". calibration: how many cases to calibrate on."""

    sample: str
    seed: int
    calibration: int

    @property
    def first_calibration(self) -> int:
        return CALIBRATION + CALIBRATION_STRIDE * self.seed

    @property
    def first_case(self) -> int:
        return EVALUATION + EVALUATION_STRIDE * self.seed

    @cached_property
    def model(self) -> Model:
        """The sample, calibrated on this seed's cases."""
        model = sources.resolve(self.sample)
        return dataclasses.replace(model, trajectories=Runs(model, self.first_calibration, self.calibration))

    @cached_property
    def weights(self) -> str:
        return self.model.weight_hash()

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """{expert: traced graph}; hand out copies."""
        return {name: trace(network) for name, network in self.model.networks()}

    @property
    def name(self) -> str:
        return f"{self.sample.removeprefix('sample:')}-{self.weights[:12]}"

    @property
    def record(self) -> Path:
        """Where the calibration record is, or will be. Formats and statistics may change: the code that observes is
        part of the name."""
        code = _sources_of(observe.__module__, "vdq_export.calib.record")
        return FOLDER / "records" / f"{self.name}-{code}-{self.first_calibration}+{self.calibration}.safetensors"

    def float_clips(self, count: int) -> list[Clip]:
        """The float model's clips of this seed's first `count` evaluation cases."""
        path = FOLDER / "float" / f"{self.name}-{self.first_case}.npy"
        known: list[Clip] = list(np.load(path)) if path.exists() else []
        if len(known) < count:
            sampler: Any = self.model.sampler
            wanted = range(self.first_case + len(known), self.first_case + count)
            known += sampler.generate_many(self.model.module, wanted, BATCH)
            write_atomically(path, lambda out: np.save(out, np.stack(known)))
        return known[:count]

    def clips(self, denoiser: Denoiser, count: int) -> list[Clip]:
        assert self.model.sampler is not None
        return [self.model.sampler.generate(denoiser, case) for case in self.cases(count)]

    def cases(self, count: int) -> range:
        return range(self.first_case, self.first_case + count)


def write_atomically(path: Path, write: Callable[[Any], object]) -> None:
    """Whole or not at all: a run that is stopped leaves no half file behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as out:
        write(out)
    partial.replace(path)


def _sources_of(*modules: str) -> str:
    """Eight digits of a hash of these modules' files."""
    import hashlib
    from importlib import import_module

    digest = hashlib.sha256()
    for name in modules:
        file = import_module(name).__file__
        assert file is not None
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:8]
