"""Recorded trajectories as files: one safetensors file each, so that what was run elsewhere calibrates here.

Tensors are called "<step>.<input>", for example "0003.hidden_states"; a tensor that a step before had, too (text, the
latent of both guidance branches), is stored once, there. The header's metadata has "format" and "steps": JSON, a list
of {"t", "branch", "inputs": {input: tensor's name}}. Beside them, record.json says what was recorded (recording.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vdq_export.errors import ModelError
from vdq_export.model import Step, Trajectory
from vdq_export.steps import checked_step, checked_trajectory

FORMAT = "vdq-trajectory-1"
SETTINGS = "record.json"  # beside the files: what was recorded


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a folder of recordings is of. model: the MODEL argument with its options; prompts: their words, or none
    where embeddings were given, whose file's sha256 is then in `embeddings`."""

    model: str
    prompts: tuple[str, ...] = ()
    negative: str = ""
    embeddings: str = ""
    frames: int = 0
    height: int = 0
    width: int = 0
    format: Literal[1] = 1

    @staticmethod
    def read(folder: Path) -> Settings | None:
        """Those of a folder, None without any. Raises ModelError for a file that says something else."""
        path = folder / SETTINGS
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=Settings)
        except msgspec.DecodeError as error:
            raise ModelError(f"{path} cannot be read: {error}", hint="record into another folder") from error


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    t: float
    branch: Literal["cond", "uncond"]
    inputs: dict[str, str]


def save(trajectory: Trajectory, path: Path) -> None:
    """Write one trajectory, the calls of one video in their order, as safetensors; equal tensors are stored once.

    Raises ModelError, before anything is written, for what is no list of steps; OSError where it cannot write.
    """
    trajectory = checked_trajectory(trajectory, str(path))
    if not trajectory:
        raise ModelError(f"{path}: a trajectory without a step", hint="record the calls of one generated video")
    stored: dict[str, torch.Tensor] = {}
    latest: dict[tuple[str, str], str] = {}  # (input, branch) -> its tensor's name at the branch's last step
    calls = []
    for number, step in enumerate(trajectory):
        names = {}
        for key, tensor in step["inputs"].items():
            known = (latest.get((key, branch)) for branch in (step["branch"], "cond", "uncond"))
            before = next((one for one in known if one is not None and _same(stored[one], tensor)), None)
            if before is None:
                before = f"{number:04d}.{key}"
                stored[before] = tensor.detach().cpu().contiguous().clone()
            latest[key, step["branch"]] = names[key] = before
        calls.append(_Call(step["t"], step["branch"], names))
    save_file(stored, path, {"format": FORMAT, "steps": msgspec.json.encode(calls).decode()})


class Recorded:
    """The trajectories in a file, or in a folder's .safetensors files by name; read when they are asked for.

    Raises ModelError for a place without any.
    """

    def __init__(self, place: Path) -> None:
        self.settings = Settings.read(place if place.is_dir() else place.parent)
        self._files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] * place.is_file()
        if not self._files:
            raise ModelError(f"there are no recorded trajectories at {place}", hint="record them, one file each")

    def __len__(self) -> int:
        return len(self._files)

    def keys(self) -> tuple[str, ...]:
        """Equal for equal files."""
        found = []
        for place in self._files:
            with place.open("rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        return tuple(found)

    def __getitem__(self, number: int) -> Trajectory:
        return read(self._files[number])

    def __iter__(self) -> Iterator[Trajectory]:
        for file in self._files:
            yield read(file)


def read(path: Path) -> Trajectory:
    """One trajectory. Raises ModelError, naming the file, for one that save() did not write."""
    try:
        with safe_open(path, framework="pt") as handle:
            facts = handle.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ModelError(f"{path} is no recorded trajectory", hint=f"its format must be {FORMAT}")
            calls = msgspec.json.decode(facts.get("steps", ""), type=list[_Call])
            names = {name for one in calls for name in one.inputs.values()}
            tensors = {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, msgspec.DecodeError) as error:
        raise ModelError(f"{path} cannot be read as a trajectory: {error}", hint="record it again") from error
    if not calls:
        raise ModelError(f"{path} holds no step", hint="record it again")
    steps: list[Step] = [
        {"t": one.t, "branch": one.branch, "inputs": {k: tensors[v] for k, v in one.inputs.items()}} for one in calls
    ]
    return checked_trajectory(steps, str(path))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other.detach().cpu()))


def check(recorded: Recorded, example: Mapping[str, torch.Tensor], place: Path, timestep: str) -> None:
    """Every recorded step has the example's inputs, shapes and types, and in the input `timestep` its t.

    Raises ModelError for the first that has not.
    """
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in example.items()}
    for number, trajectory in enumerate(recorded):
        for index, step in enumerate(trajectory):
            found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in step["inputs"].items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    raise ModelError(
                        f"{place}: trajectory {number}, step {index} has {name} {_text(found.get(name))}, "
                        f"the model takes {_text(wanted.get(name))}",
                        hint="record at the same --frames, --height and --width",
                    )
            checked_step(step, f"{place}: trajectory {number}, step {index}", timestep)


def _text(signature: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not at all" if signature is None else f"{list(signature[0])} {str(signature[1]).removeprefix('torch.')}"
