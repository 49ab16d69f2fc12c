"""A recorded call of the network, and whether it is one: looked at before hours are spent on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from numbers import Real
from typing import Any, Literal, TypedDict, cast

import torch

from vdq_export.errors import ModelError

ROUNDING = 1e-3  # relative: between a recorded t and the timestep input, which may be of float16
Tensors = Mapping[str, torch.Tensor]


class Step(TypedDict):
    """One call of the network: timestep, guidance branch, and its inputs by name."""

    t: float
    branch: Literal["cond", "uncond"]
    inputs: dict[str, torch.Tensor]


Trajectory = Sequence[Step]


def checked_step(step: Any, where: str, timestep: str | None = None, example: Tensors | None = None) -> Step:
    """`step`, or a copy with t as a float and bfloat16 inputs, which numpy has not, in float32.

    where: what messages call it; timestep: the input that carries t, where it is known; example: the model's inputs.
    Raises ModelError for what is no step: a part that misses, a branch of another name, an input that is no tensor or
    unlike the example's, and a t that is not the timestep that the network gets.
    """
    if not isinstance(step, Mapping):
        hint = "a trajectory is one list of steps" if isinstance(step, list | tuple) else 'a step is {"t": …}'
        raise ModelError(f"{where} is a {type(step).__name__}, not a step", hint=hint)
    missing = [key for key in ("t", "branch", "inputs") if key not in step]
    if missing:
        raise ModelError(f"{where} has no {missing[0]!r}", hint='a step is {"t": …, "branch": …, "inputs": {…}}')
    if step["branch"] not in ("cond", "uncond"):
        raise ModelError(
            f"{where}: branch is {step['branch']!r}", hint='say "cond" or "uncond"; "cond" where there is no guidance'
        )
    if not isinstance(step["inputs"], Mapping):
        raise ModelError(f"{where}: inputs is a {type(step['inputs']).__name__}", hint="give {name: tensor}")
    for name, value in step["inputs"].items():
        if not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{where}: input {name!r} is {type(value).__name__}, not a tensor",
                hint="leave it out, or give a tensor",
            )
    inputs = {name: one.float() if one.dtype == torch.bfloat16 else one for name, one in step["inputs"].items()}
    t = _number(step["t"], where)
    if timestep is not None:
        _check_timestep(t, inputs, timestep, where)
    for name in sorted(inputs.keys() & (example or {}).keys()):
        _check_like(inputs[name], (example or {})[name], f"{where}: input {name!r}")
    changed = type(step["t"]) is not float or any(inputs[name] is not one for name, one in step["inputs"].items())
    return {"t": t, "branch": step["branch"], "inputs": inputs} if changed else cast("Step", step)


def checked_trajectory(
    trajectory: Any, where: str, timestep: str | None = None, example: Tensors | None = None
) -> Trajectory:
    """The steps of one generated video, each as checked_step() has it. Raises ModelError as that does."""
    if isinstance(trajectory, Mapping):
        raise ModelError(
            f"{where} is a step, not a list of steps", hint="trajectories is a list of lists of steps: wrap it in [ ]"
        )
    if not isinstance(trajectory, Iterable):
        raise ModelError(f"{where} is a {type(trajectory).__name__}", hint="give a list of steps")
    return [checked_step(step, f"{where}, step {number}", timestep, example) for number, step in enumerate(trajectory)]


def checked_trajectories(
    every: Iterable[Trajectory], name: str, timestep: str, example: Tensors
) -> Iterable[Trajectory]:
    """`every`, with each step looked at when it is read: lists at once, others as they are iterated over."""
    if not isinstance(every, Iterable):
        raise ModelError(f"the trajectories of {name} are of type {type(every).__name__}", hint="give a list of lists")
    if isinstance(every, list | tuple):
        return list(_Checked(every, name, timestep, example))
    kind = _CheckedSized if isinstance(every, Sized) else _Checked
    if hasattr(every, "keys") and not isinstance(every, Mapping):
        kind = _CheckedKeyed
    return kind(every, name, timestep, example)


class _Checked:
    def __init__(self, every: Iterable[Any], name: str, timestep: str, example: Tensors) -> None:
        self._every, self._name, self._timestep, self._example = every, name, timestep, example

    def __iter__(self) -> Iterator[Trajectory]:
        return (self._checked(number, one) for number, one in enumerate(self._every))

    def _checked(self, number: int, one: Any) -> Trajectory:
        return checked_trajectory(one, f"{self._name}: trajectory {number}", self._timestep, self._example)


class _CheckedSized(_Checked):
    _every: Any

    def __len__(self) -> int:
        return len(self._every)


class _CheckedKeyed(_CheckedSized):
    """Of trajectories that are made when asked for, see calib.trajectories.Keyed."""

    def __len__(self) -> int:
        return len(self._every if isinstance(self._every, Sized) else self.keys())

    def keys(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self._every.keys()
        return found

    def __getitem__(self, number: int) -> Trajectory:
        return self._checked(number, self._every[number])


def seen_by(observer: Callable[[Step], None] | None, where: str, timestep: str) -> Callable[[Step], None]:
    """`observer`, or none, behind a look at each step of clip `where`."""
    number = 0

    def see(step: Step) -> None:
        nonlocal number
        step = checked_step(step, f"{where}, call {number}", timestep)
        number += 1
        if observer is not None:
            observer(step)

    return see


def check_sampler(sampler: Any, name: str) -> None:
    """Raise ModelError where a sampler lacks a method that is called later, or generate() an argument."""
    for method in ("generate", "describe", "settings"):
        if not callable(getattr(sampler, method, None)):
            raise ModelError(
                f"the sampler of {name} has no {method}()",
                hint="it needs generate(denoiser, case, observer), describe(case) and settings() -> dict",
            )
    try:
        inspect.signature(sampler.generate).bind(None, 0, None)
    except TypeError as error:
        raise ModelError(
            f"generate() of {name}'s sampler cannot be called so: {error}", hint="generate(denoiser, case, observer)"
        ) from error


def _number(t: Any, where: str) -> float:
    if isinstance(t, torch.Tensor) and t.numel() == 1:
        t = t.item()
    if isinstance(t, bool) or not isinstance(t, Real):
        found = f"a tensor of {list(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise ModelError(f"{where}: t is {found}, not a number", hint="give the timestep of the call, float(t)")
    return float(t)


def _check_like(given: torch.Tensor, example: torch.Tensor, what: str) -> None:
    if (given.shape, given.dtype) != (example.shape, example.dtype):
        found, wanted = (f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (given, example))
        raise ModelError(
            f"{what} is {found}, the example's is {wanted}",
            hint="graphs are static; a call is one sample of one guidance branch",
        )


def _check_timestep(t: float, inputs: Mapping[str, torch.Tensor], timestep: str, where: str) -> None:
    """A bundle finds its graph by the input; of a timestep a token, by the highest."""
    if timestep not in inputs:
        raise ModelError(f"{where} has no input {timestep!r}", hint=f"it has {', '.join(inputs)}")
    if not inputs[timestep].numel():
        raise ModelError(f"{where}: input {timestep!r} is empty", hint="give the timestep of the call")
    held = float(inputs[timestep].max())
    if not abs(t - held) <= max(ROUNDING * max(abs(t), abs(held)), 1e-6):
        raise ModelError(
            f"{where}: t is {t:g}, the input {timestep!r} holds {held:g}",
            hint="t is the timestep as the network gets it; or say another input, timestep_input= or --timestep-input",
        )
