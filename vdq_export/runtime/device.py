"""Runs a bundle's CUDA programs: on a GPU as captured graphs, elsewhere in plain torch (slow: for checks).

Everything lives on the device: the programs' weights, once for all of them; what runs ahead of the bins
(docs/hoisting.md), in float32, since it runs once a prompt; the row of the bin. A step uploads the latents and brings
the result back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vdq_export.bundle import Bundle
from vdq_export.devices import vendor_tool
from vdq_export.errors import BundleError, MissingToolError, UnknownNameError
from vdq_export.plan import Branch
from vdq_export.runtime.ahead import Ahead, Part
from vdq_export.runtime.batching import Array
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.families import Family
from vdq_export.runtime.memory import Values
from vdq_export.schedule import Schedule
from vdq_export.targets.cuda.fused_ops import HINT
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.ops import BIN
from vdq_export.targets.cuda.program import Program
from vdq_export.targets.cuda.programs import PROGRAMS, Programs

# One at a time in a process: while a graph is captured nothing else may use its memory or make kernels, and the buffers
# of programs that share memory hold one result.
_DEVICE = threading.RLock()
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
    try:
        found = torch.device(device)
        if kind == "cuda":
            torch.cuda.get_device_properties(found)
    except (RuntimeError, AssertionError) as error:
        raise MissingToolError(f"{device!r} is no device here: {str(error).splitlines()[0]}") from error
    return found


def programs_of(bundle: Bundle) -> Programs:
    """Raises BundleError for a bundle that was not made for GPUs, or whose programs are not those of its bins."""
    if not bundle.manifest.file(PROGRAMS):
        raise BundleError(
            f"{bundle.path} was made for {bundle.manifest.target} and has no programs for a GPU",
            hint="export it with --target cuda",
        )
    found = Programs.from_json((bundle.path / PROGRAMS).read_bytes())
    for one in found.programs:
        if bundle.manifest.file(one.graph) is None:
            raise BundleError(f"{PROGRAMS} names {one.graph!r}, which is no file of {bundle.path}")
    served = sorted(index for one in found.programs for index in one.bins)
    if served != list(range(len(bundle.schedule.bins))):
        raise BundleError(f"{PROGRAMS} serves bins {served}, the schedule has {len(bundle.schedule.bins)}")
    return found


class DeviceAhead(Ahead):
    """Ahead of a bundle's bins, on the device: values are torch tensors there."""

    def __init__(self, bundle: Bundle, schedule: Schedule, device: torch.device) -> None:
        super().__init__(bundle, schedule)
        self._device = device
        self._programs: dict[Path, Program] = {}

    def run(self, part: Part, inputs: Mapping[str, Array], feeds: Callable[[], Mapping[str, Any]]) -> Values:
        def run() -> Values:
            with _DEVICE, _on(self._device, exact=True):
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
    """The programs of a bundle, lowered when they are first needed. Thread-safe: one call after the other."""

    keeps_all = True  # weights are on the device once; a program without them is small

    def __init__(
        self, bundle: Bundle, schedule: Schedule, ahead: DeviceAhead, device: torch.device, dtype: str
    ) -> None:
        self._device, self.device = device, str(device)
        self._weights: dict[Any, Any] = {}
        graphs = programs_of(bundle).programs
        pool = None
        if device.type == "cuda":
            vendor_tool.module("triton", "triton", HINT)
            from vdq_export.targets.cuda import aot

            with _DEVICE, _on(device):
                aot.install(bundle)
                pool = torch.cuda.graph_pool_handle()

        def make(family: Family) -> Any:
            with _DEVICE, _on(device, exact=dtype == "float32"):
                program = lower(family.graph, device=device, dtype=DTYPES[dtype], weights=self._weights)
                return program.capture(pool) if device.type == "cuda" else program

        found = [Family(one.bins, bundle.path / one.graph, None, {bin_: {} for bin_ in one.bins}) for one in graphs]
        self._rows = {
            bin_: torch.tensor([row], dtype=torch.int64, device=self._device)
            for one in graphs
            for row, bin_ in enumerate(one.bins)
        }
        super().__init__(found, schedule, make, ahead, prefetch=False)

    def run(self, index: int, branch: Branch, inputs: Mapping[str, Array], output: str) -> Array:
        program: Any = self._session(index, branch)
        wanted = [one.name for one in program.inputs if one.name != BIN]
        with _DEVICE, _on(self._device):
            feeds = uploaded(self._ahead.feeds(index, wanted, inputs), self._device)
            if len(wanted) < len(program.inputs):
                feeds[BIN] = self._rows[index]
            result: Array = program(feeds)[output].float().cpu().numpy()
        return result

    def close(self) -> None:
        super().close()
        with _DEVICE:
            self._weights.clear()
            self._rows.clear()


@contextmanager
def _on(device: torch.device, exact: bool = False) -> Iterator[None]:
    """With `device` as the current one. exact: convolutions keep float32, which cuDNN else rounds to TF32."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.backends.cudnn.flags(allow_tf32=not exact):
        yield


def uploaded(values: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Arrays as tensors on the device; tensors stay as they are."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(device) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }
