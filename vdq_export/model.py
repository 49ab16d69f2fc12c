"""What a user brings: a module, example inputs and recorded (or sampled) trajectories.

A module may be an Experts: several networks that take turns along the denoising, by timestep, as Wan2.2's two do.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vdq_export.errors import ModelError, VdqError
from vdq_export.experts import Expert, Experts
from vdq_export.graph import Graph
from vdq_export.steps import Step as Step
from vdq_export.steps import Tensors as Tensors
from vdq_export.steps import Trajectory as Trajectory
from vdq_export.steps import check_sampler, checked_trajectories, seen_by
from vdq_export.weights import on_demand
from vdq_export.weights.checkpoint import Checkpoint
from vdq_export.weights.learned import Learned

CLIP_MARGIN = 1e-3  # beyond [0, 1], for rounding
Denoiser = Callable[..., Any]  # a transformer: called with the module's keyword inputs, returns a tensor or a tuple


class Sampler(Protocol):
    """The denoising loop of a model, so that whole clips can be compared. `case` numbers (prompt, seed) pairs."""

    steps: int

    def generate(self, denoiser: Denoiser, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        """Clip number `case`, [C, F, H, W] in [0, 1]; `observer` sees each call before it is made."""
        ...

    def describe(self, case: int) -> str:
        """The case in words, for people: its prompt, its seed."""
        ...

    def settings(self) -> dict[str, Any]:
        """Name, steps, shift, guidance …: what the schedule was calibrated for."""
        ...


class Judge(Protocol):
    """Scores clips without a reference: {measure: fraction right}."""

    def __call__(self, clips: Sequence[np.ndarray], cases: Sequence[int]) -> dict[str, float]:
        """Of `clips`, [C, F, H, W] in [0, 1] each, made for the sampler's `cases`: {measure: 0 … 1}, more is better."""
        ...


@dataclass
class Model:
    """A network to compile.

    module: any torch.nn.Module, called as module(**inputs), returning a tensor, or a tuple/list/dataclass whose first
    entry is the output tensor; Experts for a model of several networks. example_inputs: name -> tensor; shapes and
    dtypes fix the static graph. trajectories: an iterable (re-iterable; a callable that returns one also serves) of
    lists of Steps, for calibration. timestep_input: the input that carries t. sampler, judge: optional; with them
    `verify` compares whole clips.
    checkpoint, make: weights that stay in their files, and what builds the network without them; `module` is then on
    the meta device and loads them when it is first called, if they fit. prompt_inputs: the inputs that no step of a
    guidance branch changes, as far as the source knows; None: unknown. graph: the float graph, where there is one
    already; `module` then runs it and has no weights. learned: scales that training left.
    Raises ModelError for inputs that are not tensors, weights in memory that hold NaN or Inf or are not float32, and
    Experts that look for another timestep input.
    """

    module: torch.nn.Module
    example_inputs: Tensors
    trajectories: Iterable[Trajectory] | Callable[[], Iterable[Trajectory]]
    name: str = "model"
    timestep_input: str = "timestep"
    sampler: Sampler | None = None
    judge: Judge | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    make: Callable[[], torch.nn.Module] | None = None
    prompt_inputs: tuple[str, ...] | None = None
    graph: Graph | None = None
    learned: Learned | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.example_inputs, Mapping):
            raise ModelError(
                f"the example inputs are a {type(self.example_inputs).__name__}", hint="name them: {name: tensor}"
            )
        for name, tensor in self.example_inputs.items():
            if not isinstance(tensor, torch.Tensor):
                raise ModelError(f"example input {name!r} is {type(tensor).__name__}", hint="pass tensors")
            if tensor.dtype == torch.bfloat16:
                hint = "calibration and CPU kernels compute in float32: give .float()"
                raise ModelError(f"example input {name!r} is bfloat16", hint=hint)
        if self.sampler is not None:
            check_sampler(self.sampler, self.name)
        if isinstance(self.trajectories, Iterator):
            raise ModelError(
                f"the trajectories of {self.name} can be read only once",
                hint="give a list, or the function that makes them",
            )
        if self.timestep_input not in self.example_inputs:
            raise ModelError(
                f"no input named {self.timestep_input!r}",
                hint=f"set timestep_input to one of {', '.join(self.example_inputs)}",
            )
        if isinstance(self.module, Experts) and self.module.timestep_input != self.timestep_input:
            raise ModelError(
                f"the experts go by {self.module.timestep_input!r}, the model by {self.timestep_input!r}",
                hint="give both the same timestep_input",
            )
        if (self.checkpoint is None) != (self.make is None):
            raise ModelError(f"{self.name} has one of checkpoint and make", hint="give both or neither")
        half = [name for name, one in self.module.named_parameters() if _is_other_float(one)]
        if half:
            dtype = str(self.module.get_parameter(half[0]).dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.name} has weights in {dtype} ({half[0]} and {len(half) - 1} more)",
                hint="calibration and CPU kernels compute in float32: network.float()",
            )
        self.module.eval()
        for name, tensor in self.module.state_dict().items():  # those of a checkpoint: Checkpoint.digest()
            if not tensor.is_meta and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ModelError(f"weight {name} of {self.name} holds NaN or Inf", hint="fix the checkpoint")

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The networks of a model that has several, highest timesteps first; () for one network."""
        return self.module.experts if isinstance(self.module, Experts) else ()

    def networks(self) -> list[tuple[str, Model]]:
        """(expert name, that network as a model of its own) each; [("", self)] for a model of one network.

        An expert's model has the steps of its range for trajectories, read when they are asked for, and neither sampler
        nor judge: no clip comes from one expert. Raises ModelError then for a step that is no expert's, and for an
        expert that no step asks for.
        """
        if not isinstance(self.module, Experts):
            return [("", self)]
        return [
            (
                one.name,
                Model(
                    module=one.module,
                    example_inputs=self.example_inputs,
                    trajectories=_StepsOf(self, self.module, one.name),
                    name=f"{self.name}/{one.name}",
                    timestep_input=self.timestep_input,
                    metadata=dict(self.metadata),
                    checkpoint=one.checkpoint,
                    make=one.make,
                    prompt_inputs=self.prompt_inputs,
                    learned=one.learned,
                ),
            )
            for one in self.experts
        ]

    def arguments(self) -> tuple[str, ...]:
        """Names of what the network is called with, in the order of its forward(); () where that takes anything.

        Arguments that were given once for all (functools.partial) keep their place.
        """
        known = inspect.signature(self.module.forward).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return tuple(one.name for one in known if one.kind not in variadic)

    def limits(self, expert: str) -> tuple[float | None, float | None]:
        """Ends (lo, hi) of an expert's range beyond which another one serves; None where none does."""
        return self.module.limits(expert) if isinstance(self.module, Experts) else (None, None)

    def iter_trajectories(self) -> Iterable[Trajectory]:
        """The trajectories; ModelError, as they are read, for what checked_step() refuses."""
        every = self.trajectories() if callable(self.trajectories) else self.trajectories
        return checked_trajectories(every, self.name, self.timestep_input, self.example_inputs)

    def weight_hash(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of the weights, the input signature, and the experts' ranges.

        Of a checkpoint its bytes as they are stored, once read. Raises ModelError where those hold NaN or Inf.
        """
        digest = hashlib.sha256()
        checkpoints = [x for x in (self.checkpoint, *(one.checkpoint for one in self.experts)) if x is not None]
        for checkpoint in checkpoints:
            digest.update(checkpoint.digest().encode())
        for scales in (self.learned, *(one.learned for one in self.experts)):
            if scales is not None:
                digest.update(scales.digest().encode())
        if self.graph is not None:
            digest.update(self.graph.hash().encode())
        for name, tensor in [] if checkpoints else sorted(self.module.state_dict().items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in self.example_inputs.items():
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        for one in self.experts:
            digest.update(f"{one.name}|{one.t[0]!r}|{one.t[1]!r}|".encode())
        return digest.hexdigest()

    def materialized(self) -> torch.nn.Module:
        """The module with its weights loaded. Raises ModelError where they do not fit in memory."""
        for checkpoint, module, name in (
            (self.checkpoint, self.module, self.name),
            *((one.checkpoint, one.module, f"{self.name}/{one.name}") for one in self.experts),
        ):
            if checkpoint is not None:
                on_demand.load(module, checkpoint, name)
        return self.module

    def clip(self, denoiser: Denoiser, case: int, observer: Callable[[Step], None] | None = None) -> np.ndarray:
        """Clip number `case` that the sampler makes with `denoiser`, [C, F, H, W] in [0, 1].

        Raises ModelError where there is no sampler, it fails, what it makes is no clip, or what it shows is no step.
        """
        if self.sampler is None:
            raise ModelError(f"{self.name} has no sampler, so there are no clips", hint="give its Model a sampler")
        try:
            see = seen_by(observer, f"{self.name}: clip {case}", self.timestep_input)
            made = np.asarray(self.sampler.generate(denoiser, case, see))
        except VdqError:
            raise
        except Exception as error:  # the user's own code
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {' '.join(str(error).split())} ({where.filename}:{where.lineno})"
            raise ModelError(
                f"the sampler of {self.name} failed on clip {case}: {told}",
                hint="it is called with the network, and with the bundle, which answers as the network does",
            ) from error
        if made.ndim != 4 or not (made.size and np.issubdtype(made.dtype, np.floating)):
            raise ModelError(
                f"the sampler of {self.name} made a clip of {made.dtype}{list(made.shape)}",
                hint="generate() returns floats [C, F, H, W] in [0, 1]: channels, frames, height, width"
                + ("; divide by 255" if made.dtype == np.uint8 else ""),
            )
        if not (made.min() >= -CLIP_MARGIN and made.max() <= 1 + CLIP_MARGIN):  # NaN neither
            raise ModelError(
                f"the sampler of {self.name} made clip {case} with values from {made.min():g} to {made.max():g}",
                hint="PSNR is of clips in [0, 1]: map them there, and .clip(0, 1)",
            )
        return made

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The network's output tensor, without gradients. Raises ModelError for weights that do not fit in memory."""
        with torch.no_grad():
            return first_tensor(self.materialized()(**inputs))


class _StepsOf:
    """The steps of `whole`'s trajectories that are `expert`'s; trajectories without one are left out."""

    def __init__(self, whole: Model, experts: Experts, expert: str) -> None:
        self._whole, self._experts, self._expert = whole, experts, expert

    def __iter__(self) -> Iterator[Trajectory]:
        found = False
        for number, trajectory in enumerate(self._whole.iter_trajectories()):
            try:
                mine = [step for step in trajectory if self._experts.serving(step["t"]).name == self._expert]
            except ModelError as error:
                raise ModelError(f"{self._whole.name}, trajectory {number}: {error.what}", hint=error.hint) from error
            if mine:
                found = True
                yield mine
        if not found:
            raise ModelError(
                f"no step of {self._whole.name}'s trajectories is expert {self._expert}'s ({self._experts.ranges()})",
                hint="record trajectories that run through every expert's timesteps",
            )


def _is_other_float(tensor: torch.Tensor) -> bool:
    """Of a network in memory; weights that stay in their files are cast when they are loaded."""
    return not tensor.is_meta and tensor.is_floating_point() and tensor.dtype != torch.float32


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
