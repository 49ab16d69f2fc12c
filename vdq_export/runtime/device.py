"""Runs a bundle's CUDA programs: on a GPU as captured graphs, elsewhere in plain torch (slow: for checks).

Everything lives on the device: the programs' weights, once for all of them; what runs ahead of the bins
(docs/hoisting.md), in float32, since it runs once a prompt; the row of the bin. A step uploads the latents and brings
the result back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, MissingToolError, UnknownNameError
from vdq_export.plan import Branch
from vdq_export.runtime.ahead import Ahead, Part
from vdq_export.runtime.batching import Array
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.families import Family
from vdq_export.runtime.memory import Values
from vdq_export.schedule import Schedule
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.ops import BIN
from vdq_export.targets.cuda.program import Program
from vdq_export.targets.cuda.programs import PROGRAMS, Programs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def checked(device: str, dtype: str) -> torch.device:
    """Raises UnknownNameError for a type or a kind of device that there is not, MissingToolError without a GPU."""
    if dtype not in DTYPES:
        raise UnknownNameError("type of the floats", dtype, DTYPES)
    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        raise UnknownNameError("device", device, ("cuda", "cpu"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise MissingToolError(
            "no GPU that torch can use",
            hint='a CUDA build of torch and a driver are needed; device="cpu" checks numbers',
        )
    return torch.device(device)


def programs_of(bundle: Bundle) -> Programs:
    """Raises BundleError for a bundle that was not made for GPUs."""
    if not bundle.manifest.file(PROGRAMS):
        raise BundleError(
            f"{bundle.path} was made for {bundle.manifest.target} and has no programs for a GPU",
            hint="export it with --target cuda",
        )
    return Programs.from_json((bundle.path / PROGRAMS).read_bytes())


class DeviceAhead(Ahead):
    """Ahead of a bundle's bins, on the device: values are torch tensors there."""

    def __init__(self, bundle: Bundle, schedule: Schedule, device: torch.device) -> None:
        super().__init__(bundle, schedule)
        self._device = device
        self._programs: dict[Path, Program] = {}

    def run(self, part: Part, inputs: Mapping[str, Array], feeds: Callable[[], Mapping[str, Any]]) -> Values:
        def run() -> Values:
            made = self._program(part.graph)(uploaded(feeds(), self._device))
            self.count(f"{part.kind}_runs")
            return made

        memory = self._prompts if part.kind == "prompt" else self._steps
        return memory.recall(str(part.graph), {name: inputs[name] for name in part.reads}, run)

    def close(self) -> None:
        with self._lock:
            self._programs.clear()
        super().close()

    def _program(self, graph: Path) -> Program:
        with self._lock:
            if graph not in self._programs:
                self._programs[graph] = lower(graph, device=self._device, dtype=torch.float32)
            return self._programs[graph]


class DeviceEngine(Engine):
    """The programs of a bundle. Thread-safe: a program's buffers serve one call after the other."""

    keeps_all = True  # weights are on the device once; a program without them is small

    def __init__(
        self, bundle: Bundle, schedule: Schedule, ahead: DeviceAhead, device: torch.device, dtype: str
    ) -> None:
        self._device = device
        weights: dict[Any, Any] = {}
        if device.type == "cuda":
            from vdq_export.targets.cuda import aot  # triton

            aot.install(bundle)
        graphs = programs_of(bundle).programs

        def make(family: Family) -> Any:
            program = lower(family.graph, device=self._device, dtype=DTYPES[dtype], weights=weights)
            if self._device.type == "cuda":
                program.capture()
            return program

        found = [Family(one.bins, bundle.path / one.graph, None, {bin_: {} for bin_ in one.bins}) for one in graphs]
        self._rows = {
            bin_: torch.tensor([row], dtype=torch.int64, device=self._device)
            for one in graphs
            for row, bin_ in enumerate(one.bins)
        }
        self._running = threading.Lock()
        super().__init__(found, schedule, make, ahead, prefetch=False)

    def run(self, index: int, branch: Branch, inputs: Mapping[str, Array], output: str) -> Array:
        program: Any = self._session(index, branch)
        wanted = [one.name for one in program.inputs if one.name != BIN]
        feeds = uploaded(self._ahead.feeds(index, wanted, inputs), self._device)
        if len(wanted) < len(program.inputs):
            feeds[BIN] = self._rows[index]
        with self._running:
            result: Array = program(feeds)[output].float().cpu().numpy()
        return result


def uploaded(values: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on the device; tensors stay as they are."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(device) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }
