"""The scheduler of a pipeline folder: diffusers' own classes compute timesteps and steps, nothing is computed anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.sources import families
from vdq_export.sources._weights import read_json

KNOWN = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "UniPCMultistepScheduler",
)


class Scheduler:
    """A diffusers scheduler set to a number of steps. tokens: of the latent, for schedulers that shift by length.

    sigmas: noise levels that the pipeline gives a flow-matching scheduler.

    Raises ModelError for a scheduler not known here, settings it refuses, and a shift it has no use for.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        origin: str,
        steps: int,
        shift: float | None,
        tokens: int,
        sigmas: list[float] | None = None,
    ) -> None:
        self.name = str(config.get("_class_name"))
        self.steps = steps
        if self.name not in KNOWN:
            raise ModelError(f"{origin}: scheduler {self.name!r} is not known here", hint=f"known: {', '.join(KNOWN)}")
        import diffusers

        kind = getattr(diffusers, self.name)
        settings = {k: v for k, v in config.items() if not k.startswith("_") and k in kind._get_init_keys(kind)}
        flows = self.name == "FlowMatchEulerDiscreteScheduler"
        dynamic = bool(settings.get("use_dynamic_shifting"))
        if shift is not None and not dynamic:
            if not flows and not settings.get("use_flow_sigmas"):
                raise ModelError(f"{origin}: {self.name} has no shift", hint="leave --shift out")
            settings["shift" if flows else "flow_shift"] = shift
        self._settings, self._kind, self._origin = settings, kind, origin
        if sigmas is None and dynamic:
            sigmas = families.even_sigmas(steps)
        self._call: dict[str, Any] = {"sigmas": sigmas} if flows and sigmas else {"num_inference_steps": steps}
        if dynamic:
            self._call |= {"mu": self._mu(config, shift, tokens)}
        self.timesteps: torch.Tensor = self.fresh().timesteps

    def fresh(self) -> Any:
        """The scheduler at its first step."""
        try:
            made = self._kind.from_config(dict(self._settings))
            made.set_timesteps(**self._call)
        except Exception as error:  # what a class makes of settings that cannot be is its own affair
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"{self._origin}: {self.name} refuses it at {self.steps} steps: {why}", hint="mend it or --steps"
            ) from error
        return made

    @property
    def config(self) -> dict[str, Any]:
        """What it was made of, and how its timesteps were asked for."""
        return {**self._settings, **self._call}

    @property
    def horizon(self) -> float:
        """The highest timestep there can be."""
        return float(self.fresh().config.num_train_timesteps)

    def _mu(self, config: Mapping[str, Any], shift: float | None, tokens: int) -> float:
        """What set_timesteps() shifts by: of the latent's length, as LTX's pipeline has it, or the shift chosen."""
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        if shift is None:
            return float(least + (most - least) * (tokens - low) / (high - low))
        # sigma -> e^mu σ / (1 + (e^mu − 1) σ), or mu itself in its place
        return shift if config.get("time_shift_type") == "linear" else math.log(shift)


def config_of(pipeline: Path | None, class_name: str) -> tuple[Mapping[str, Any], str]:
    """(scheduler configuration, where it is from): the pipeline's, else the family's. Raises ModelError for neither."""
    if pipeline is not None:
        path = pipeline / "scheduler" / "scheduler_config.json"
        return read_json(path), str(path)
    family = families.find(class_name)
    if family is None or family.scheduler is None:
        raise ModelError(
            f"no scheduler of {class_name} is known", hint="give the pipeline folder, which has one, or --trajectories"
        )
    return family.scheduler, f"default of {class_name}"
