"""What a user brings: a module, example inputs and recorded (or sampled) trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

import numpy as np
import torch

from vdq_export.errors import ModelError

Tensors = Mapping[str, torch.Tensor]
Denoiser = Callable[..., Any]  # a transformer: called with the module's keyword inputs, returns a tensor or a tuple


class Step(TypedDict):
    """One call of the network: timestep, guidance branch, and its inputs by name."""

    t: float
    branch: Literal["cond", "uncond"]
    inputs: dict[str, torch.Tensor]


Trajectory = Sequence[Step]


class Sampler(Protocol):
    """The denoising loop of a model, so that whole clips can be compared. `case` numbers (prompt, seed) pairs."""

    steps: int

    def generate(self, denoiser: Denoiser, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        """Clip number `case`, [C, F, H, W] in [0, 1]; `observer` sees each call before it is made."""
        ...

    def describe(self, case: int) -> str: ...

    def settings(self) -> dict[str, Any]:
        """Name, steps, shift, guidance …: what the schedule was calibrated for."""
        ...


class Judge(Protocol):
    """Scores clips without a reference: {measure: fraction right}."""

    def __call__(self, clips: Sequence[np.ndarray], cases: Sequence[int]) -> dict[str, float]: ...


@dataclass
class Model:
    """A network to compile.

    module: any torch.nn.Module, called as module(**inputs), returning a tensor, or a tuple/list/dataclass whose first
    entry is the output tensor. example_inputs: name -> tensor; shapes and dtypes fix the static graph.
    trajectories: an iterable (re-iterable; a callable that returns one also serves) of lists of Steps, for calibration.
    timestep_input: the input that carries t. sampler, judge: optional; with them `verify` compares whole clips.
    Raises ModelError for inputs that are not tensors or weights that hold NaN or Inf.
    """

    module: torch.nn.Module
    example_inputs: Tensors
    trajectories: Iterable[Trajectory] | Callable[[], Iterable[Trajectory]]
    name: str = "model"
    timestep_input: str = "timestep"
    sampler: Sampler | None = None
    judge: Judge | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self.example_inputs.items():
            if not isinstance(tensor, torch.Tensor):
                raise ModelError(f"example input {name!r} is {type(tensor).__name__}", hint="pass tensors")
        if self.timestep_input not in self.example_inputs:
            raise ModelError(
                f"no input named {self.timestep_input!r}",
                hint=f"set timestep_input to one of {', '.join(self.example_inputs)}",
            )
        self.module.eval()
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ModelError(f"weight {name} of {self.name} holds NaN or Inf", hint="fix the checkpoint")

    def iter_trajectories(self) -> Iterable[Trajectory]:
        return self.trajectories() if callable(self.trajectories) else self.trajectories

    def weight_hash(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the weights, and the input signature."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            )
        for name, tensor in self.example_inputs.items():
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        return digest.hexdigest()

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The network's output tensor, without gradients."""
        with torch.no_grad():
            return first_tensor(self.module(**inputs))


def first_tensor(output: Any) -> torch.Tensor:
    """The output tensor of what a diffusers transformer returns (tensor, tuple, or output dataclass)."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list) and output:
        return first_tensor(output[0])
    if isinstance(output, Mapping) and output:
        return first_tensor(next(iter(output.values())))
    if hasattr(output, "sample"):
        return first_tensor(output.sample)
    raise ModelError(
        f"the module returned {type(output).__name__}", hint="return a tensor or a tuple that starts with one"
    )
