"""An .onnx file with recorded trajectories: a network somebody else exported, compiled as one traced here would be.

The file is the float graph; onnxruntime runs it where the network itself is asked for. Free dimensions become those of
the recorded steps. Weights beside the file are mapped, not read. Nodes are named by the modules they were exported
from, as far as the file tells (see _onnx_names).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from vdq_export.errors import ModelError
from vdq_export.model import Model
from vdq_export.recorded import Recorded
from vdq_export.recorded import check as check_recorded
from vdq_export.sources import _onnx_graph
from vdq_export.sources._options import Options

ACCEPTS = "an .onnx file with --trajectories"
TAKES_OPTIONS = True
TIMESTEP_NAMES = ("timestep", "timesteps", "time_step", "t", "time", "sigma")
_OURS = {"--trajectories", "--timestep-input"}


def accepts(spec: str) -> bool:
    return Path(spec).suffix.lower() == ".onnx"


def load(spec: str, options: Options) -> Model:
    """The model of a file. Raises ModelError, naming file and value, for what cannot be compiled."""
    path = Path(spec)
    if foreign := sorted(set(options.names()) - _OURS):
        raise ModelError(f"{path} takes no {foreign[0]}", hint="its shapes are fixed and its schedule is recorded")
    if not path.is_file():
        raise ModelError(f"there is no file {path}", hint="give the path of an .onnx file")
    if options.trajectories is None:
        raise ModelError(
            f"{path} needs recorded trajectories", hint="--trajectories PATH; docs/bring-your-own-model.md says how"
        )
    recorded = Recorded(Path(options.trajectories))
    first = next(iter(recorded))
    example = dict(first[0]["inputs"])
    file = _onnx_graph.read(path, {name: _signature(tensor) for name, tensor in example.items()})
    timestep = _timestep_input(path, options.timestep_input, recorded)
    check_recorded(recorded, example, Path(options.trajectories), timestep)
    return Model(
        OnnxNetwork(path, file.output),
        example,
        recorded,
        timestep_input=timestep,
        metadata={"config": {"file": path.name, "opset": file.opset}, "notes": list(file.notes)},
        graph=file.graph,
    )


class OnnxNetwork(torch.nn.Module):
    """The file's network run by onnxruntime; float32 or integer tensors by input name to the output tensor."""

    def __init__(self, path: Path, output: str) -> None:
        super().__init__()
        self._path, self._output = path, output
        self._session: Any = None  # made at the first call: compiling needs it once, a large one not at all

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        if self._session is None:
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = 3
            try:
                self._session = onnxruntime.InferenceSession(str(self._path), settings, ["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's own exceptions share no base
                why = " ".join(str(error).split())[:200]
                raise ModelError(
                    f"{self._path}: onnxruntime does not load it: {why}", hint="export it again"
                ) from error
        taken = {one.name for one in self._session.get_inputs()}
        feeds = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items() if name in taken}
        return torch.from_numpy(self._session.run([self._output], feeds)[0])


def _signature(tensor: torch.Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return tuple(tensor.shape), tensor.numpy().dtype


def _timestep_input(path: Path, chosen: str | None, recorded: Recorded) -> str:
    """The input that carries t: the one chosen, else the one of a usual name, else the only one that equals t.

    Raises ModelError for a name that no input has, and where none or several could be meant.
    """
    first = next(iter(recorded))
    inputs = first[0]["inputs"]
    if chosen is not None:
        if chosen not in inputs:
            raise ModelError(f"{path} has no input {chosen!r}", hint=f"its inputs: {', '.join(inputs)}")
        return chosen
    named = [name for name in TIMESTEP_NAMES if name in inputs]
    if named:
        return named[0]
    equal = [
        name
        for name, tensor in inputs.items()
        if tensor.numel() >= 1 and all(_equals(step["inputs"].get(name), step["t"]) for step in first if step["t"])
    ]
    if len(equal) != 1:
        found = f"several inputs equal it: {', '.join(equal)}" if equal else "no input equals it at every step"
        raise ModelError(
            f"{path}: which input is the timestep? None has a usual name ({', '.join(TIMESTEP_NAMES)}) and {found}",
            hint=f"--timestep-input NAME, one of {', '.join(inputs)}",
        )
    return equal[0]


def _equals(tensor: torch.Tensor | None, t: float) -> bool:
    return tensor is not None and bool((tensor.double() == t).all())
