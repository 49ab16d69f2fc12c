"""Run the float graph over the model's trajectories and keep what calibration needs, in bounded memory.

The graph runs in ORT with the observed values as extra outputs. Where those together exceed `limit` bytes a call, they
are spread over several sessions that share the weights. Statistics are updated call by call; no activation is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch

from vdq_export import ort
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord, denoising_order, not_finite
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph, is_constant
from vdq_export.model import Model, Step

Progress = Callable[[int, int | None], None]  # calls done, calls in all where that is known
ROWS = 64  # sampled token rows a value and slot
TOP = 4  # rows of largest norm kept beside them
LIMIT = 512 * 2**20  # bytes of observed values a session returns
MAX_SLOTS = 4096


@dataclass(frozen=True)
class Observed:
    """One value to watch: its name, why, who reads it, and its bytes a call."""

    name: str
    kind: Literal["linear", "attention"]
    readers: tuple[str, ...]
    size: int


def observe(
    graph: Graph,
    model: Model,
    *,
    progress: Progress | None = None,
    rows: int = ROWS,
    limit: int = LIMIT,
    threads: int | None = None,
) -> CalibrationRecord:
    """Run every step of `model.iter_trajectories()` through the canonical float `graph`.

    progress(done, total) is called after each call; total is None while unknown. Deterministic: the same calls in any
    split over sessions give the same record. Raises CalibrationError for NaN or Inf (layer and timestep named), for
    inputs that do not fit the graph, and for a model without trajectories.
    """
    watched = observed_values(graph)
    inputs = {v.name: v for v in graph.gs.inputs}
    sessions = [_Session(graph, names, inputs, threads) for names in _chunks(watched, set(inputs), limit)]
    seen: dict[str, dict[Slot, _Statistics]] = {w.name: {} for w in watched}
    done = 0
    for step, total in iter_steps(model):
        slot = Slot(float(step["t"]), step["branch"])
        feeds = step_feeds(step, sessions[0].dtypes, slot)
        for session in sessions:
            found = session.run(feeds, slot)
            for one in (w for w in watched if w.name in session.names):
                value = found[one.name] if one.name in found else feeds[one.name]
                _update(seen[one.name], one, slot, np.asarray(value, np.float32), rows)
        _check_outputs(found, sessions[-1].final, slot)
        done += 1
        if progress is not None:
            progress(done, total)
    if not done:
        raise CalibrationError(
            f"model {model.name} brought no trajectories", hint="calibration needs at least one step"
        )
    slots = tuple(sorted(next(iter(seen.values())), key=denoising_order)) if watched else ()
    settings = {} if model.sampler is None else dict(model.sampler.settings())
    values = {w.name: _finish(w, [seen[w.name][slot] for slot in slots]) for w in watched}
    return CalibrationRecord(
        model.name, graph.source or model.weight_hash(), graph.hash(), slots, values, done, settings
    )


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
    graph_inputs = {v.name for v in graph.gs.inputs}
    for name, (value, _) in found.items():
        if is_constant(value) or (not value.inputs and name not in graph_inputs):
            raise CalibrationError(f"{name}, read by {readers[name][0]}, is computed by no node of the graph")
        if value.shape is None or not all(isinstance(d, int) for d in value.shape):
            raise CalibrationError(f"{name}, read by {readers[name][0]}, has no static shape")
    return [Observed(n, kind, tuple(readers[n]), 4 * prod(v.shape)) for n, (v, kind) in found.items()]


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

    def __init__(self, graph: Graph, names: list[str], inputs: Mapping[str, Any], threads: int | None) -> None:
        self.names = set(names)
        self.inner = [n for n in names if n not in inputs]
        # Without prepacking, sessions of one graph use the very arrays they are handed: weights exist once.
        options = {"session.disable_prepacking": "1"}
        try:
            self.session = ort.session(graph, outputs=self.inner, threads=threads, options=options)
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
    return {name: _array(step["inputs"][name], types[name]) for name in types}


def _array(tensor: torch.Tensor, ort_type: str) -> Array:
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    plain = tensor.detach().cpu()
    # numpy knows no bfloat16
    return np.ascontiguousarray((plain.float() if plain.dtype == torch.bfloat16 else plain).numpy(), dtype=dtype)


def _check_outputs(found: Mapping[str, Array], final: Sequence[str], slot: Slot) -> None:
    for name in final:
        if found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            raise CalibrationError(
                f"NaN or Inf in output {name} at {slot}, though no linear reads any", hint="check the last layers"
            )


@dataclass
class _Statistics:
    """Running statistics of one value in one slot; `keys` chose `rows`, `norms` (squared) chose `top`."""

    lo: Array
    hi: Array
    peak: Array
    rows: Array
    keys: Array
    top: Array
    norms: Array
    count: int = 0
    calls: int = 0


def _update(seen: dict[Slot, _Statistics], one: Observed, slot: Slot, value: Array, rows: int) -> None:
    """`value` is [batch, …, tokens, C]."""
    channels = value.shape[-1]
    flat = value.reshape(-1, channels)
    low, high = flat.min(axis=0), flat.max(axis=0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise not_finite(one.name, one.readers, slot, "first seen there in the float graph")
    if slot not in seen:
        if len(seen) >= MAX_SLOTS:
            raise CalibrationError(
                f"more than {MAX_SLOTS} distinct timesteps", hint="calibrate on the sampler's own timesteps"
            )
        empty = np.empty((0, channels), np.float32)
        seen[slot] = _Statistics(low, high, np.zeros(channels), empty, np.empty(0), empty, np.empty(0))
    kept = seen[slot]
    kept.lo, kept.hi = np.minimum(kept.lo, low), np.maximum(kept.hi, high)
    if one.kind == "linear":
        batch = value.reshape(value.shape[0] if value.ndim > 2 else 1, -1, channels)
        kept.peak = kept.peak + np.maximum(batch.max(axis=1), -batch.min(axis=1)).mean(axis=0)
        _sample(kept, flat, _seed(one.name, slot, kept.calls), rows)
        _keep_largest(kept, flat)
    kept.count += len(flat)
    kept.calls += 1


def _sample(kept: _Statistics, flat: Array, seed: int, rows: int) -> None:
    """Each row seen gets a random key; the rows with the smallest keys stay: a uniform sample without replacement."""
    keys = np.random.default_rng(seed).random(len(flat))
    kept.keys, kept.rows = _least(kept.keys, kept.rows, keys, flat, rows)


def _keep_largest(kept: _Statistics, flat: Array) -> None:
    norms = np.einsum("tc,tc->t", flat, flat, dtype=np.float64)
    negative, kept.top = _least(-kept.norms, kept.top, -norms, flat, TOP)
    kept.norms = -negative


def _least(keys: Array, rows: Array, new_keys: Array, new_rows: Array, most: int) -> tuple[Array, Array]:
    """The `most` smallest of both key lists, ascending, and their rows."""
    best = np.argpartition(new_keys, most)[:most] if len(new_keys) > most else np.arange(len(new_keys))
    joint, candidates = np.concatenate([keys, new_keys[best]]), np.concatenate([rows, new_rows[best]])
    order = np.argsort(joint, kind="stable")[:most]
    return joint[order], candidates[order]


def _seed(name: str, slot: Slot, call: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}|{slot.t!r}|{slot.branch}|{call}".encode()).digest()[:8], "little")


def _finish(one: Observed, slots: Sequence[_Statistics]) -> ValueRecord:
    lo, hi = np.stack([s.lo for s in slots]), np.stack([s.hi for s in slots])
    count = np.array([s.count for s in slots], np.int64)
    if one.kind == "attention":
        return ValueRecord(one.name, one.kind, one.readers, lo, hi, count)
    peak = np.stack([s.peak / s.calls for s in slots]).astype(np.float32)
    rows, top = _equally_many([s.rows for s in slots]), _equally_many([s.top for s in slots])
    return ValueRecord(one.name, one.kind, one.readers, lo, hi, count, peak, rows, top)


def _equally_many(slots: Sequence[Array]) -> Array:
    """[S, most, C]: a slot that saw fewer rows repeats its own."""
    most = max(len(rows) for rows in slots)
    return np.stack([rows[np.arange(most) % len(rows)] for rows in slots])
