"""The embedded sample: moving handwritten digits (see README.md). `load()` makes one of its variants a Model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from vdq_export.errors import ModelError, UnknownNameError
from vdq_export.experts import Expert, Experts
from vdq_export.model import Model, Step, Trajectory
from vdq_export.samples.digits import experts, hard, network
from vdq_export.samples.digits.judge import DigitsJudge
from vdq_export.samples.digits.sampler import CALIBRATION, DigitsSampler

NAMES = ("digits", "digits-hard", "digits-moe")


class CalibrationRuns:
    """The trajectories of calibration cases, each made when it is asked for and made again the next time."""

    def __init__(self, module: torch.nn.Module, sampler: DigitsSampler, cases: int) -> None:
        """cases: how many; their prompts and seeds follow from their numbers."""
        self.module, self.sampler, self.cases = module, sampler, cases

    def __len__(self) -> int:
        return self.cases

    def keys(self) -> tuple[str, ...]:
        """What each trajectory depends on beside the network's weights."""
        settings = sorted(self.sampler.settings().items())
        return tuple(f"case {case} of {settings}" for case in range(CALIBRATION, CALIBRATION + self.cases))

    def __getitem__(self, number: int) -> Trajectory:
        if not 0 <= number < self.cases:
            raise IndexError(number)
        steps: list[Step] = []
        self.sampler.generate(self.module, CALIBRATION + number, steps.append)
        return steps

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(self.cases))


def load_network(weights: Path | None = None) -> torch.nn.Module:
    """The trained float32 network; `weights` (safetensors) instead of the package's own. Raises ModelError."""
    if weights is not None and weights.suffix != ".safetensors":
        raise ModelError(f"{weights} is not a safetensors file", hint="convert it; pickled checkpoints are refused")
    return _network({name: tensor.float() for name, tensor in _read("weights.safetensors", weights).items()})


def load_experts(folder: Path | None = None) -> Experts:
    """The float32 experts of digits-moe; `folder` has other differences from the package's base. Raises ModelError."""
    base = _read("weights.safetensors")
    parts = []
    for name, t in experts.RANGES.items():
        file = experts.weights_name(name)
        stored = _read(file, folder and folder / file)
        try:
            parts.append(Expert(name, _network(experts.decode(base, stored)), t))
        except KeyError as error:
            raise ModelError(f"{file} lacks {error}", hint="train it again") from error
    return Experts(parts)


def _read(name: str, instead: Path | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file of the package, or of another one `instead`. Raises ModelError."""
    with resources.as_file(resources.files(__name__) / name) as own:
        path = instead or own
        try:
            return load_file(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: {error}") from error
        except Exception as error:  # safetensors raises its own SafetensorError, which is not exported for typing
            raise ModelError(f"{path} is damaged: {error}", hint="reinstall, or train it again") from error


def _network(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    module = network.build()
    module.load_state_dict(state)
    return module.eval()


def load(name: str = "digits", weights: Path | None = None, calibration_cases: int = 8) -> Model:
    """The sample as a Model: "digits"; "digits-hard", the same function with outlier channels (hard.py); "digits-moe",
    two experts (experts.py).

    weights: another safetensors checkpoint of the same network; of digits-moe, the folder of its two. Raises
    UnknownNameError, ModelError.
    """
    if name not in NAMES:
        raise UnknownNameError("sample", name, NAMES)
    if name == "digits-moe":
        module: torch.nn.Module = load_experts(weights)
    else:
        module = load_network(weights)
    if name == "digits-hard":
        module = hard.harden(module)
    sampler = DigitsSampler()
    one = module.experts[0].module if isinstance(module, Experts) else module
    config = {key: value for key, value in cast(Mapping[str, Any], one.config).items() if not key.startswith("_")}
    example = {
        "hidden_states": torch.zeros(1, *sampler.shape),
        "timestep": torch.full((1,), 500.0),
        "encoder_hidden_states": torch.zeros(1, *sampler.prompt_shape),
    }
    return Model(
        module=module,
        example_inputs=example,
        trajectories=CalibrationRuns(module, sampler, calibration_cases),
        name=name,
        sampler=sampler,
        judge=DigitsJudge(),
        metadata={"family": "wan", "config": config, "calibration_cases": calibration_cases},
    )
