"""Calibration of a network that does not fit in memory: all samples through one segment of its graph, then the next.

What crosses from segment to segment lies on disk, each array once however many calls share it (a prompt's values are
the same at every step), and is forgotten when no later segment reads it. The record is the one observe() makes, to the
last bit, for segments run the same operators on the same numbers.

A unit of work is one trajectory through one segment. Finished units are kept in a WorkStore under the hash of what they
depend on, so that a run which was killed goes on with the unit it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import psutil

from vdq_export.calib.constant_inputs import Constancy, in_all
from vdq_export.calib.observe import LIMIT, ROWS, check_outputs, observed_values, step_feeds
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord, denoising_order
from vdq_export.calib.statistics import TOP, Observed, Seen
from vdq_export.calib.trajectories import Runs, digest
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph
from vdq_export.graphs import segments
from vdq_export.graphs.segments import BUDGET, CPU, Running, Segment, SegmentedNetwork
from vdq_export.model import Model, Trajectory
from vdq_export.work import store as work_store
from vdq_export.work.engine import cores
from vdq_export.work.store import WorkStore

Progress = Callable[[int, int | None], None]
_Held = list[dict[str, str]]  # of each call, {value: key of its array}
SHARE = 0.5  # of the memory that is free: with more float weights than that, whole sessions are not opened
STATISTICS = 128 * 2**20  # bytes of statistics a segment gathers in a trajectory; keeping them takes a few times that


@dataclass(frozen=True)
class _Call:
    """One call of the network. inputs: keys of the arrays it was given."""

    t: float
    branch: Literal["cond", "uncond"]
    inputs: dict[str, str]

    @property
    def slot(self) -> Slot:
        return Slot(self.t, self.branch)


@dataclass(frozen=True)
class _Sample:
    """One trajectory. constant: its constant inputs, as Constancy names them."""

    calls: tuple[_Call, ...]
    constant: tuple[str, ...] | None


def is_too_large(graph: Graph, share: float = SHARE) -> bool:
    """Whether the float weights of `graph` exceed this share of the memory that is free now."""
    return bool(segments.weight_bytes(graph) > share * psutil.virtual_memory().available)


def calibrate(
    graph: Graph, model: Model, store: WorkStore | None, *, progress: Progress | None = None
) -> CalibrationRecord:
    """observe_blocks(); trajectories that a network makes which does not fit either are made by its segments.

    Raises CalibrationError without a `store`, and as observe_blocks() does.
    """
    if store is None:
        raise CalibrationError(
            "calibrating segment by segment needs room on disk for what crosses", hint="give --work DIR"
        )
    if is_too_large(graph) and hasattr(model.trajectories, "network"):
        model.trajectories.network = SegmentedNetwork(graph, store=store, threads=cores())
    return observe_blocks(graph, model, store, progress=progress)


def observe_blocks(
    graph: Graph,
    model: Model,
    store: WorkStore,
    *,
    progress: Progress | None = None,
    rows: int = ROWS,
    limit: int = LIMIT,
    budget: int = BUDGET,
    threads: int | None = None,
    provider: str = CPU,
) -> CalibrationRecord:
    """As observe(), with the weights of one segment in memory at a time: those below `budget` bytes.

    progress(done, total) counts calls of segments. limit: bytes of values that a call of a segment returns. The record
    is mapped from a file in the store's folder: save() it where it shall outlive that. provider: of onnxruntime; other
    ones than the CPU's compute other last bits. Raises CalibrationError as observe() does, and for a provider that is
    not there.
    """
    segments.check_provider(provider)
    threads = threads or cores()  # said, as observe() does
    graph_hash = graph.hash()
    watched = observed_values(graph)
    samples = list(_samples(graph, graph_hash, model, store))
    if not samples:
        raise CalibrationError(
            f"model {model.name} brought no trajectories", hint="calibration needs at least one step"
        )
    slots = sorted({call.slot for one in samples for call in one.calls}, key=denoising_order)
    made = {value.name for node in graph.nodes for value in node.outputs}
    costs = {one.name: _cost(one, graph, len(slots), rows, limit) for one in watched if one.name in made}
    chain = segments.split(graph, budget, costs, limit)
    key = work_store.key("blocks", graph_hash, rows, [(one.start, one.stop) for one in chain], threads, provider)
    job = _Job(key, graph, watched, chain, samples, store, rows, {"threads": threads, "provider": provider})
    place = store.folder / "units" / f"{work_store.key(key, samples)}.record.safetensors"
    if not place.is_file():
        found = job.run(progress)
        CalibrationRecord(
            model=model.name,
            model_hash=graph.source or model.weight_hash(),
            graph_hash=graph_hash,
            slots=tuple(slots),
            values=_Stored(found, store),
            calls=sum(len(one.calls) for one in samples),
            sampler={} if model.sampler is None else dict(model.sampler.settings()),
            constant_inputs=in_all((one.constant for one in samples), model.timestep_input),
        ).save(place)
    return CalibrationRecord.load(place, graph_hash)


def _cost(one: Observed, graph: Graph, slots: int, rows: int, limit: int) -> int:
    """Bytes a call returns for a value, or its share of `limit` where its statistics weigh more."""
    channels = graph.values()[one.name].shape[-1] if one.kind == "linear" else 0
    statistics = 4 * slots * (rows + TOP) * channels
    return max(one.size, limit * statistics // STATISTICS)


def _samples(graph: Graph, graph_hash: str, model: Model, store: WorkStore) -> Iterator[_Sample]:
    """The model's trajectories, their inputs stored. Of those that have keys, the ones stored before are not made."""
    types = {str(one.name): np.dtype(one.dtype).name for one in graph.gs.inputs}
    stored = set[str]()
    for identity, make in _each(Runs(model), model):
        key = work_store.key("sample", graph_hash, identity)
        known = store.get(key)
        if known is None:
            known = work_store.encode(_stored_sample(make(), types, store, stored))
            store.put(key, known)
        yield work_store.decode(known, _Sample)


def _each(runs: Runs, model: Model) -> Iterator[tuple[str, Callable[[], Trajectory]]]:
    """(what a trajectory depends on, how to get it) each, in order."""
    if runs.keys is None:
        yield from ((digest(one), partial(_itself, one)) for one in model.iter_trajectories())
    else:
        yield from ((one, partial(_numbered, runs, number)) for number, one in enumerate(runs.keys))


def _numbered(runs: Runs, number: int) -> Trajectory:
    return next(runs.since(number))


def _itself(trajectory: Trajectory) -> Trajectory:
    return trajectory


def _stored_sample(trajectory: Trajectory, types: Mapping[str, str], store: WorkStore, stored: set[str]) -> _Sample:
    constancy, calls = Constancy(), list[_Call]()
    for step in trajectory:
        constancy.see(step)
        feeds = step_feeds(step, types, Slot(float(step["t"]), step["branch"]))
        inputs = {name: _put(store, "inputs", array, stored) for name, array in feeds.items()}
        calls.append(_Call(float(step["t"]), step["branch"], inputs))
    return _Sample(tuple(calls), constancy.names)


def _put(store: WorkStore, owner: str, array: Array, stored: set[str]) -> str:
    """Keep an array of `owner`'s under its content; returns the key. stored: those that this process has kept."""
    key = work_store.key("array", owner, array)
    if key not in stored:
        store.put(key, segments.pack(array))
        stored.add(key)
    return key


def _get(store: WorkStore, key: str, what: str) -> bytes:
    data = store.get(key)
    if data is None:
        raise CalibrationError(f"{what} in {store.folder} is damaged or gone", hint="remove the folder and start again")
    return data


class _Stored(Mapping[str, ValueRecord]):
    """Values by name from the store, read one at a time."""

    def __init__(self, keys: Mapping[str, str], store: WorkStore) -> None:
        self._keys, self._store = keys, store

    def __getitem__(self, name: str) -> ValueRecord:
        return work_store.decode(_get(self._store, self._keys[name], f"what was seen of {name}"), ValueRecord)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class _Job:
    """One observation. key: of all that its units have in common but for the samples; settings: of Running."""

    key: str
    graph: Graph
    watched: Sequence[Observed]
    chain: Sequence[Segment]
    samples: Sequence[_Sample]
    store: WorkStore
    rows: int
    settings: Mapping[str, Any]

    def run(self, progress: Progress | None) -> dict[str, str]:
        """{value: key of its ValueRecord}, in the order of `watched`."""
        calls = sum(len(one.calls) for one in self.samples)
        held = [[dict(call.inputs) for call in one.calls] for one in self.samples]  # {value: key} that each call has
        found: dict[str, str] = {}
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, calls * len(self.chain))

        for segment in self.chain:
            found |= self._segment(segment, held, tick)
            done = calls * (segment.number + 1)
            self._forget(segment.number, held)
        return {one.name: found[one.name] for one in self.watched}

    @cached_property
    def _last_read(self) -> dict[str, int]:
        """{value: number of the last segment that takes it as an input}."""
        return {name: one.number for one in self.chain for name in one.inputs}

    def _segment(self, segment: Segment, held: list[_Held], tick: Callable[[], None]) -> dict[str, str]:
        """{value: key of its ValueRecord} of those the segment makes; `held` gets what crosses to later ones."""
        nodes = self.graph.nodes[segment.start : segment.stop]
        made = {value.name for node in nodes for value in node.outputs}
        if segment.number == 0:  # linears may read inputs of the graph
            made |= {str(one.name) for one in self.graph.gs.inputs}
        mine = [one for one in self.watched if one.name in made]
        units = [work_store.key(self.key, segment.number, n, one.calls) for n, one in enumerate(self.samples)]
        finished = work_store.key("finished", self.key, segment.number, units)
        running: Running | None = None
        for number, (unit, sample) in enumerate(zip(units, self.samples, strict=True)):
            known = self.store.get(unit)
            if known is None:
                running = running or Running(segments.extract(self.graph, segment), **self.settings)
                seen, crossing = self._unit(segment, running, mine, number, sample, held[number], tick)
                self.store.put(work_store.key("seen", unit), seen.to_bytes())
                known = work_store.encode(crossing)
                self.store.put(unit, known)
            for keys, more in zip(held[number], work_store.decode(known, _Held), strict=True):
                keys |= more
        del running
        known = self.store.get(finished)
        return work_store.decode(known, dict[str, str]) if known else self._finish(finished, units, mine)

    def _finish(self, finished: str, units: Sequence[str], mine: Sequence[Observed]) -> dict[str, str]:
        """Put together what the units saw."""
        seen, keys = Seen(), dict[str, str]()
        for unit in units:
            data = _get(self.store, work_store.key("seen", unit), "what was seen of a trajectory")
            seen.add(Seen.from_bytes(data), self.rows)
        for one in mine:
            keys[one.name] = work_store.key(finished, one.name)
            self.store.put(keys[one.name], work_store.encode(seen.record(one)))
            del seen.values[one.name]
        self.store.put(finished, work_store.encode(keys))
        for unit in units:
            self.store.drop(work_store.key("seen", unit))
        return keys

    def _unit(
        self,
        segment: Segment,
        running: Running,
        mine: Sequence[Observed],
        number: int,
        sample: _Sample,
        held: _Held,
        tick: Callable[[], None],
    ) -> tuple[Seen, _Held]:
        """One trajectory through one segment: what is seen, and {value: key} of what crosses, of each call."""
        seen, crossing, stored = Seen(first=number, trajectories=1), _Held(), set[str]()
        for call, keys in zip(sample.calls, held, strict=True):
            wanted = {*running.types, *(one.name for one in mine if one.name in call.inputs)}
            feeds = {name: segments.unpack(_get(self.store, keys[name], name)) for name in sorted(wanted)}
            try:
                values = feeds | running(feeds)
            except Exception as error:  # onnxruntime raises classes of its own, without a common public base
                raise CalibrationError(f"the float graph fails at {call.slot}: {error}") from error
            for one in mine:
                seen.update(one, call.slot, np.asarray(values[one.name], np.float32), self.rows)
            finals = [str(one.name) for one in self.graph.gs.outputs if one.name in segment.outputs]
            check_outputs(values, finals, call.slot)
            later = [name for name in segment.outputs if name in self._last_read]
            # Of this segment alone: a later one may make an equal array, which must stay when this one is forgotten.
            owner = f"{self.key}.{segment.number}"
            crossing.append({name: _put(self.store, owner, values[name], stored) for name in later})
            seen.calls += 1
            tick()
        seen.constant = [sample.constant]
        return seen, crossing

    def _forget(self, number: int, held: list[_Held]) -> None:
        """Drop what crossed and no segment after `number` reads; inputs stay, other observations may share them."""
        every = [keys for calls in held for keys in calls]
        needed = {key for keys in every for name, key in keys.items() if self._last_read.get(name, -1) > number}
        inputs = {key for one in self.samples for call in one.calls for key in call.inputs.values()}
        gone = {key for keys in every for key in keys.values()} - needed - inputs
        for key in gone:
            self.store.drop(key)
        for keys in every:
            for name in [name for name, key in keys.items() if key in gone]:
                del keys[name]
