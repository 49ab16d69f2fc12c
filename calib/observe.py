"""Run the float graph over the model's trajectories and keep what calibration needs, in bounded memory.

The graph runs in ORT with the observed values as extra outputs. Where those together exceed `limit` bytes a call, they
are spread over several sessions that share the weights. Statistics are updated call by call; no activation is kept.

Every operator runs as it stands: which values are asked for, and in what split, then changes no bit of any. Graphs
whose weights do not fit in memory go through blocks.py, which gives the same record.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

import msgspec
import numpy as np
import onnx

from vdq_export import ort
from vdq_export.calib.constant_inputs import Constancy, in_all
from vdq_export.calib.record import CalibrationRecord, Slot
from vdq_export.calib.statistics import Observed, Seen
from vdq_export.calib.trajectories import Runs
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph, is_constant
from vdq_export.graphs import attention
from vdq_export.graphs.segments import feed
from vdq_export.model import Model, Step, Trajectory
from vdq_export.work import store as work_store
from vdq_export.work.engine import Engine, cores
from vdq_export.work.store import WorkStore

Progress = Callable[[int, int | None], None]  # calls done, calls in all where that is known
ROWS = 64  # sampled token rows a value and slot
LIMIT = 512 * 2**20  # bytes of observed values a session returns
WORTH = 10  # what was seen is kept where that takes less than one in WORTH of the time since it last was
MOST = 2**30  # bytes of it that are kept: keeping takes a few times that in memory, and MessagePack ends at 4 GiB


def observe(
    graph: Graph,
    model: Model,
    *,
    progress: Progress | None = None,
    rows: int = ROWS,
    limit: int = LIMIT,
    threads: int | None = None,
    engine: Engine | None = None,
    store: WorkStore | None = None,
) -> CalibrationRecord:
    """Run every step of `model.iter_trajectories()` through the canonical float `graph`.

    progress(done, total) is called after each call; total is None while unknown. engine: where trajectories run, here
    by default. store: keeps what was seen after each trajectory, and is asked for it first. Deterministic: the same
    calls in any split over sessions, interruptions and machines give the same record. Raises CalibrationError for NaN
    or Inf (layer and timestep named), for inputs that do not fit the graph, and for a model without trajectories.
    """
    graph_hash = graph.hash()
    threads = threads or cores()  # said, for with many of them the split of a product decides last bits
    identity = work_store.key("observe", graph_hash, rows, limit, threads)
    job = Job(identity, graph, tuple(observed_values(graph)), rows, limit, threads)
    kept = _Kept(store, identity, Runs(model), rows)
    if engine is not None and engine.is_remote:
        _observe_elsewhere(job, kept, engine, progress)
    else:
        _observe_here(job, kept, progress)
    seen = kept.seen
    if not seen.calls:
        raise CalibrationError(
            f"model {model.name} brought no trajectories", hint="calibration needs at least one step"
        )
    return CalibrationRecord(
        model=model.name,
        model_hash=graph.source or model.weight_hash(),
        graph_hash=graph_hash,
        slots=seen.slots,
        values={one.name: seen.record(one) for one in job.watched},
        calls=seen.calls,
        sampler={} if model.sampler is None else dict(model.sampler.settings()),
        constant_inputs=in_all(seen.constant, model.timestep_input),
    )


@dataclass(frozen=True)
class Job:
    """What every trajectory of one observation has in common; it can be sent to other machines. key: equal jobs have
    equal ones."""

    key: str
    graph: Graph
    watched: tuple[Observed, ...]
    rows: int
    limit: int
    threads: int

    def run(self, number: int, trajectory: Sequence[Step], tick: Callable[[], None] = lambda: None) -> Seen:
        """What trajectory `number` shows; tick is called after each call. Raises CalibrationError as observe() does."""
        seen, constancy = Seen(first=number, trajectories=1), Constancy()
        for step in trajectory:
            constancy.see(step)
            slot = Slot(float(step["t"]), step["branch"])
            feeds = step_feeds(step, self._sessions[0].dtypes, slot)
            for session in self._sessions:
                found = session.run(feeds, slot)
                for one in (w for w in self.watched if w.name in session.names):
                    value = found[one.name] if one.name in found else feeds[one.name]
                    seen.update(one, slot, np.asarray(value, np.float32), self.rows)
            check_outputs(found, self._sessions[-1].final, slot)
            seen.calls += 1
            tick()
        seen.constant = [constancy.names]
        return seen

    @cached_property
    def _sessions(self) -> list[_Session]:
        inputs = {v.name: v for v in self.graph.gs.inputs}
        chunks = _chunks(self.watched, set(inputs), self.limit)
        return [_Session(self.graph, names, inputs, self.threads) for names in chunks]

    def __getstate__(self) -> dict[str, Any]:
        proto, arrays = self.graph.skeleton()
        plain = {name: value for name, value in vars(self).items() if name not in ("graph", "_sessions")}
        return {**plain, "graph": (proto.SerializeToString(), arrays, self.graph.source)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        proto, arrays, source = state.pop("graph")
        vars(self).update(state, graph=Graph.from_proto(onnx.ModelProto.FromString(proto), arrays, source))


class _Kept:
    """What was seen so far, here and, with a store, in the runs that were cut short."""

    def __init__(self, store: WorkStore | None, identity: str, runs: Runs, rows: int) -> None:
        self.runs, self._store, self._identity, self._rows = runs, store, identity, rows
        self.seen, self._link = self._found() or (Seen(), identity)
        self._links: deque[str] = deque()  # of trajectories drawn and not yet added
        self._last, self._cost = time.monotonic(), 0.0

    def draw(self) -> Iterator[tuple[int, Trajectory]]:
        """(number, trajectory) of those that are missing."""
        link, first = self._link, self.seen.trajectories
        for number, trajectory in enumerate(self.runs.since(first), first):
            if self._store is not None:
                link = self.runs.link(link, number, trajectory)
                self._links.append(link)
            yield number, trajectory

    def add(self, one: Seen) -> None:
        """The next trajectory's. It is kept unless that takes long in comparison with making it, or much memory."""
        self.seen.add(one, self._rows)
        if self._store is None:
            return
        self._link = self._links.popleft()
        began = time.monotonic()
        if began - self._last >= WORTH * self._cost and self.seen.nbytes <= MOST:
            self._store.put(self._identity, work_store.encode((self._link, self.seen.to_bytes())))
            self._last = time.monotonic()
            self._cost = self._last - began

    def _found(self) -> tuple[Seen, str] | None:
        data = None if self._store is None else self._store.get(self._identity)
        if data is None:
            return None
        try:
            link, state = work_store.decode(data, tuple[str, bytes])
            seen = Seen.from_bytes(state)
        except msgspec.MsgspecError:
            return None
        return (seen, link) if self.runs.chain(self._identity, seen.trajectories) == link else None


def _observe_here(job: Job, kept: _Kept, progress: Progress | None) -> None:
    done, count = kept.seen.calls, kept.runs.count
    for number, trajectory in kept.draw():
        total = None if count is None else count * len(trajectory)  # trajectories of one sampler are equally long

        def tick(total: int | None = total) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        kept.add(job.run(number, trajectory, tick))


def _observe_elsewhere(job: Job, kept: _Kept, engine: Engine, progress: Progress | None) -> None:
    name = lambda task: f"the calibration run of trajectory {task[0]}"  # noqa: E731
    for one in engine.in_order(run_elsewhere, kept.draw(), name=name, shared=job, cores=job.threads):
        kept.add(one)
        if progress is not None:
            count = kept.runs.count
            progress(kept.seen.calls, None if count is None else count * one.calls)


def run_elsewhere(job: Job, task: tuple[int, Trajectory]) -> Seen:
    """Job.run() in a process that keeps the sessions for the next trajectory of the same job."""
    if job.key not in _JOBS:
        _JOBS.clear()
        _JOBS[job.key] = job
    return _JOBS[job.key].run(*task)


_JOBS: dict[str, Job] = {}


def observed_values(graph: Graph) -> list[Observed]:
    """Inputs of linears and both operands of attention matmuls, in graph order; what is both counts as the former."""
    readers: dict[str, list[str]] = {}
    found: dict[str, tuple[Any, Literal["linear", "attention"]]] = {}
    for linear in graph.linears():
        found.setdefault(linear.value.name, (linear.value, "linear"))
        readers.setdefault(linear.value.name, []).append(linear.name)
    for node in graph.attention_matmuls():
        for operand in node.inputs:
            found.setdefault(operand.name, (operand, "attention"))
            readers.setdefault(operand.name, []).append(node.name)
    heads = {one.v.name: (1, 3) for one in attention.find(graph) if one.heads}
    heads |= {value.name: (1,) for one in attention.find(graph) if one.heads for value in (one.q, one.k)}
    graph_inputs = {v.name for v in graph.gs.inputs}
    for name, (value, _) in found.items():
        if is_constant(value) or (not value.inputs and name not in graph_inputs):
            raise CalibrationError(f"{name}, read by {readers[name][0]}, is computed by no node of the graph")
        if value.shape is None or not all(isinstance(d, int) for d in value.shape):
            raise CalibrationError(f"{name}, read by {readers[name][0]}, has no static shape")
    return [
        Observed(n, kind, tuple(readers[n]), 4 * prod(v.shape), heads.get(n, ()) if kind == "attention" else ())
        for n, (v, kind) in found.items()
    ]


def _chunks(watched: Sequence[Observed], inputs: set[str], limit: int) -> Iterator[list[str]]:
    """Names in graph order, each list below `limit` bytes (or one value); graph inputs cost nothing."""
    chunk: list[str] = []
    size = 0
    for one in watched:
        cost = 0 if one.name in inputs else one.size
        if chunk and size + cost > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(one.name)
        size += cost
    yield chunk


class _Session:
    """The graph with some inner values as outputs."""

    def __init__(self, graph: Graph, names: list[str], inputs: Mapping[str, Any], threads: int) -> None:
        self.names = set(names)
        self.inner = [n for n in names if n not in inputs]
        # Without prepacking, sessions of one graph use the very arrays they are handed: weights exist once.
        options = {"session.disable_prepacking": "1"}
        try:
            self.session = ort.session(graph, outputs=self.inner, threads=threads, options=options, exact=True)
        except Exception as error:  # onnxruntime raises classes of its own, without a common public base
            raise CalibrationError(f"onnxruntime cannot run the float graph: {error}") from error
        outputs = {o.name for o in self.session.get_outputs()}
        missing = sorted(set(self.inner) - outputs)
        if missing:
            raise CalibrationError(f"onnxruntime does not return {', '.join(missing)}")
        self.final = sorted(outputs - set(self.inner))
        self.dtypes = {i.name: i.type for i in self.session.get_inputs()}

    def run(self, feeds: dict[str, Array], slot: Slot) -> dict[str, Array]:
        names = [*self.inner, *self.final]
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:  # as above
            raise CalibrationError(f"the float graph fails at {slot}: {error}") from error


def iter_steps(model: Model) -> Iterator[tuple[Step, int | None]]:
    trajectories = model.iter_trajectories()
    total = None
    for trajectory in trajectories:
        if total is None and isinstance(trajectories, Sized):
            total = len(trajectories) * len(trajectory)  # trajectories of one sampler are equally long
        for step in trajectory:
            yield step, total


def step_feeds(step: Step, types: Mapping[str, str], slot: Slot) -> dict[str, Array]:
    """A step's inputs as onnxruntime wants them; types: of the session's inputs. CalibrationError for missing ones."""
    missing, extra = sorted(types.keys() - step["inputs"].keys()), sorted(step["inputs"].keys() - types.keys())
    if missing:
        raise CalibrationError(
            f"the trajectory has no input {', '.join(missing)} at {slot}", hint=f"it has {', '.join(extra)}"
        )
    return {name: feed(step["inputs"][name], types[name]) for name in types}


def check_outputs(found: Mapping[str, Array], final: Sequence[str], slot: Slot) -> None:
    """Raises CalibrationError for NaN or Inf in the outputs `final` of the graph."""
    for name in final:
        if found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            raise CalibrationError(
                f"NaN or Inf in output {name} at {slot}, though no linear reads any", hint="check the last layers"
            )
