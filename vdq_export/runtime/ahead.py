"""Runs what left the graphs of the bins (docs/hoisting.md), and gives these the values they take in its place.

What depends on the prompt is run again when the prompt changes, in any bit; what depends on the timestep is a row of
the tables, and of other timesteps what the step graph gives. All of it runs on onnxruntime's CPU provider, whatever
provider runs the bins; device.py runs it where its programs run.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ScheduleError
from vdq_export.manifest import Signature
from vdq_export.runtime import families
from vdq_export.runtime.batching import Array
from vdq_export.runtime.memory import Memory, Values
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.tables import Tables
from vdq_export.schedule import Hoisted, Schedule

Value = Any  # an Array, or an ort.OrtValue: onnxruntime has no types
GIB = 1 << 30


@dataclass
class Counts:
    """Runs of the graphs that run ahead, and calls that found a row of the tables."""

    prompt_runs: int = 0
    step_runs: int = 0
    mixed_runs: int = 0
    table_hits: int = 0


@dataclass(frozen=True)
class Part:
    """One graph of `kind` prompt, step or mixed, by names of inputs and outputs; `reads`: of them all, through others,
    what the model itself is called with.
    """

    kind: str
    graph: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reads: tuple[str, ...]


class _Parts:
    """What serves the bins of one entry of the schedule. root: the bundle's folder."""

    def __init__(self, root: Path, hoisted: Hoisted, signature: Signature) -> None:
        self.tables = Tables(root / hoisted.tables, hoisted.timesteps) if hoisted.tables else None
        self.makers: dict[str, Part] = {}
        self.has_step = bool(hoisted.step)
        model = {one.name for one in signature.inputs}
        for kind, path in (("prompt", hoisted.prompt), ("step", hoisted.step), ("mixed", hoisted.mixed)):
            if path:
                part = self._part(kind, root / path, model, signature.timestep)
                self.makers |= dict.fromkeys(part.outputs, part)

    def _part(self, kind: str, graph: Path, model: Collection[str], timestep: str) -> Part:
        found = onnx.load(graph, load_external_data=False).graph
        inputs = tuple(value.name for value in found.input)
        reads = {name for name in inputs if name in model}
        for name in inputs:
            if name in self.makers:
                reads |= set(self.makers[name].reads)
            elif self.tables and name in self.tables.values:
                reads.add(timestep)
        return Part(kind, graph, inputs, tuple(value.name for value in found.output), tuple(sorted(reads)))


class Ahead:
    """What runs ahead of a bundle's bins. Thread-safe; close() it.

    schedule: otherwise than the bundle's. threads: of one operator; None lets onnxruntime choose. Graphs are loaded
    when they are first needed.
    """

    def __init__(self, bundle: Bundle, schedule: Schedule | None = None, threads: int | None = None) -> None:
        schedule, signature = schedule or bundle.schedule, bundle.manifest.signature
        self.timestep = signature.timestep
        self._uncalibrated = schedule.uncalibrated
        self._parts = {
            index: parts
            for hoisted in schedule.hoisted
            for parts in [_Parts(bundle.path, hoisted, signature)]
            for index in hoisted.bins
        }
        self._make = SessionFactory(Backend(), {}, threads, mapped=True)
        self._lock = threading.Lock()
        self._sessions: dict[Path, ort.InferenceSession] = {}
        self._counts = Counts()
        self._warned = False
        # Of a prompt: hundreds of MB for a large model, needed at every step. The rest: little, for one step.
        self._prompts = Memory(most=64, least=3, budget=GIB)
        self._steps = Memory(most=16, least=4, budget=GIB // 4)

    @property
    def one_timestep(self) -> frozenset[int]:
        """Bins that take rows of tables, which hold for all samples of a run."""
        return frozenset(index for index, parts in self._parts.items() if parts.tables)

    @property
    def counts(self) -> Counts:
        """A copy of the counts so far."""
        with self._lock:
            return Counts(**vars(self._counts))

    def feeds(self, index: int, names: Collection[str], inputs: Mapping[str, Array]) -> dict[str, Value]:
        """What bin `index` takes as `names`, for one run of it with the model's inputs `inputs`.

        Raises BundleError when a graph does not load or nothing gives a value, ScheduleError for a timestep that has
        neither row nor step graph where the schedule refuses these.
        """
        if index not in self._parts:
            return {name: inputs[name] for name in names}
        call = _Call(self, self._parts[index], inputs)
        return {name: call.value(name) for name in names}

    def arrays(self, index: int, session: ort.InferenceSession, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """feeds() of all that `session` takes, as session.run() wants them: to measure graphs of a bin one by one."""
        found = self.feeds(index, [one.name for one in session.get_inputs()], inputs)
        return {name: value if isinstance(value, np.ndarray) else value.numpy() for name, value in found.items()}

    def close(self) -> None:
        """Forget results and free sessions; idempotent."""
        with self._lock:
            self._sessions.clear()
        self._prompts.clear()
        self._steps.clear()

    def run(self, part: Part, inputs: Mapping[str, Array], feeds: Callable[[], Mapping[str, Value]]) -> Values:
        """What `part` gives for the model's `inputs`, run on feeds() unless that is known already."""

        def run() -> Values:
            binding = bind(session := self._session(part.graph), feeds())
            for name in part.outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            self.count(f"{part.kind}_runs")
            return dict(zip(part.outputs, binding.get_outputs(), strict=True))

        memory = self._prompts if part.kind == "prompt" else self._steps
        return memory.recall(str(part.graph), {name: inputs[name] for name in part.reads}, run)

    def count(self, what: str) -> None:
        with self._lock:
            setattr(self._counts, what, getattr(self._counts, what) + 1)

    def _session(self, graph: Path) -> ort.InferenceSession:
        with self._lock:
            if graph not in self._sessions:
                (family,) = families.alone([graph])
                self._sessions[graph] = self._make(family)
            return self._sessions[graph]

    def nearest(self, tables: Tables, t: float) -> int:
        """The row for a timestep that has none, where no graph makes one: refused, or the nearest with one warning."""
        row = tables.nearest(t)
        told = f"timestep {t:g} has no row in the tables"
        if self._uncalibrated == "refuse":
            raise ScheduleError(told, hint='use the calibrated sampler, or load with uncalibrated="nearest"')
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(f"{told}; using the nearest, of {tables.timestep(row):g} (said once)", stacklevel=2)
        return row


class _Call:
    """The values for one run of a bin, each made when it is asked for."""

    def __init__(self, ahead: Ahead, parts: _Parts, inputs: Mapping[str, Array]) -> None:
        self._ahead = ahead
        self._parts = parts
        self._inputs = inputs
        self._made: dict[Path, Values] = {}

    def value(self, name: str) -> Value:
        tables = self._parts.tables
        if name in self._inputs:
            return self._inputs[name]
        if tables and name in tables.values and self._row is not None:
            return tables.read(name, self._row)
        if (part := self._parts.makers.get(name)) is None:
            raise BundleError(f"nothing in the bundle gives {name!r}, which a graph takes")
        if part.graph not in self._made:  # asked once for all its values: the answer compares inputs
            made = self._ahead.run(part, self._inputs, lambda: {one: self.value(one) for one in part.inputs})
            self._made[part.graph] = made
        return self._made[part.graph][name]

    @cached_property
    def _row(self) -> int | None:
        """The row of the tables for this call; None: the step graph makes what it would hold."""
        tables, every = self._parts.tables, self._inputs[self._ahead.timestep].reshape(-1)
        assert tables is not None
        if not (every == every[0]).all():  # a timestep for each token
            if self._parts.has_step:
                return None
            raise BundleError("the tables are for one timestep at a time, the call has several", hint="call with one")
        t = float(every[0])
        if (row := tables.row(t)) is not None:
            self._ahead.count("table_hits")
            return row
        return None if self._parts.has_step else self._ahead.nearest(tables, t)


def bind(session: ort.InferenceSession, feeds: Mapping[str, Value]) -> ort.IOBinding:
    """A binding of its own with these inputs: one that calls share would mix the inputs of two threads."""
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, value)
        else:
            binding.bind_ortvalue_input(name, value)
    return binding
