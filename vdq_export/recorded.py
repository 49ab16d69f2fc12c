"""Recorded trajectories as files: one safetensors file each, so that what was run elsewhere calibrates here.

Tensors are called "<step>.<input>", for example "0003.hidden_states"; a tensor that the step before had, too (text), is
stored once, there. The header's metadata has "format" and "steps": JSON, a list of {"t", "branch", "inputs": {input:
tensor's name}}.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vdq_export.errors import ModelError
from vdq_export.model import Step, Trajectory

FORMAT = "vdq-trajectory-1"


class _Call(msgspec.Struct, forbid_unknown_fields=True):
    t: float
    branch: Literal["cond", "uncond"]
    inputs: dict[str, str]


def save(trajectory: Trajectory, path: Path) -> None:
    """Write one trajectory."""
    stored: dict[str, torch.Tensor] = {}
    latest: dict[tuple[str, str], str] = {}  # (input, branch) -> its tensor's name at the branch's last step
    calls = []
    for number, step in enumerate(trajectory):
        names = {}
        for key, tensor in step["inputs"].items():
            before = latest.get((key, step["branch"]))
            if before is None or not _same(stored[before], tensor):
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
        self._files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] * place.is_file()
        if not self._files:
            raise ModelError(f"there are no recorded trajectories at {place}", hint="record them, one file each")

    def __len__(self) -> int:
        return len(self._files)

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
    return steps


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other.detach().cpu()))
