"""Running statistics of observed values: of one trajectory, and of several, one after the other.

What a trajectory adds depends on itself and its number alone, and trajectories are added in their order. So a record is
the same to the last bit whether they were run in one go, after an interruption, or on several machines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from vdq_export.calib.record import Slot, ValueRecord, denoising_order, not_finite
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array
from vdq_export.work import store as work_store

TOP = 4  # rows of largest norm kept beside the sampled ones
MAX_SLOTS = 4096


@dataclass(frozen=True)
class Observed:
    """One value to watch: its name, why, who reads it, and its bytes a call.

    heads: axes of which the largest magnitudes are kept, the heads first: an attention's operand.
    """

    name: str
    kind: Literal["linear", "attention"]
    readers: tuple[str, ...]
    size: int
    heads: tuple[int, ...] = ()


@dataclass
class Statistics:
    """Of one value in one slot. lo, hi, peak (the sum over the calls): [C]; `keys` chose `rows` [n, C], `norms`
    (squared) chose `top` [m, C]; heads: as in ValueRecord, of this slot."""

    lo: Array
    hi: Array
    peak: Array
    rows: Array
    keys: Array
    top: Array
    norms: Array
    heads: Array
    count: int = 0  # token rows
    calls: int = 0


_ARRAYS = tuple(one.name for one in fields(Statistics))[:8]


@dataclass
class Seen:
    """What the trajectories number `first`, `first + 1` … showed. constant: of each, the names of its constant inputs,
    or None."""

    first: int = 0
    trajectories: int = 0
    calls: int = 0
    constant: list[tuple[str, ...] | None] = field(default_factory=list)
    values: dict[str, dict[Slot, Statistics]] = field(default_factory=dict)

    def update(self, one: Observed, slot: Slot, value: Array, rows: int) -> None:
        """One call of this, the only trajectory: `value` is [batch, …, tokens, C].

        rows: how many are sampled a slot. Raises CalibrationError for NaN or Inf and for too many slots.
        """
        channels = value.shape[-1]
        flat = value.reshape(-1, channels)
        low, high = flat.min(axis=0), flat.max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise not_finite(one.name, one.readers, slot, "first seen there in the float graph")
        seen = self.values.setdefault(one.name, {})
        if slot not in seen:
            _check_slots(len(seen) + 1)
            empty = np.empty((0, channels), np.float32)
            none = np.empty(0)
            seen[slot] = Statistics(low, high, np.zeros(channels), empty, none, empty, none, _magnitudes(value, one))
        kept = seen[slot]
        kept.lo, kept.hi = np.minimum(kept.lo, low), np.maximum(kept.hi, high)
        if one.kind == "linear":
            batch = value.reshape(value.shape[0] if value.ndim > 2 else 1, -1, channels)
            kept.peak = kept.peak + np.maximum(batch.max(axis=1), -batch.min(axis=1)).mean(axis=0)
            _sample(kept, flat, _seed(one.name, slot, self.first, kept.calls), rows)
            norms = np.einsum("tc,tc->t", flat, flat, dtype=np.float64)
            _keep_largest(kept, norms, flat)
        elif one.heads:
            kept.heads = np.maximum(kept.heads, _magnitudes(value, one))
        kept.count += len(flat)
        kept.calls += 1

    def add(self, later: Seen, rows: int) -> None:
        """Count in the trajectories that follow these. Raises CalibrationError for too many slots."""
        assert later.first == self.first + self.trajectories
        self.trajectories += later.trajectories
        self.calls += later.calls
        self.constant += later.constant
        for name, slots in later.values.items():
            mine = self.values.setdefault(name, {})
            for slot, theirs in slots.items():
                if slot in mine:
                    _merge(mine[slot], theirs, rows)
                else:
                    mine[slot] = theirs
            _check_slots(len(mine))

    @property
    def slots(self) -> tuple[Slot, ...]:
        return tuple(sorted(next(iter(self.values.values()), {}), key=denoising_order))

    @property
    def nbytes(self) -> int:
        """Bytes of all statistics."""
        every = (one for slots in self.values.values() for one in slots.values())
        return sum(int(getattr(one, name).nbytes) for one in every for name in _ARRAYS)

    def record(self, one: Observed) -> ValueRecord:
        """What a record holds of one value, over all slots."""
        found = [self.values[one.name][slot] for slot in self.slots]
        lo, hi = np.stack([s.lo for s in found]), np.stack([s.hi for s in found])
        count = np.array([s.count for s in found], np.int64)
        if one.kind == "attention":
            heads = np.stack([s.heads for s in found]) if one.heads else None
            return ValueRecord(one.name, one.kind, one.readers, lo, hi, count, heads=heads)
        peak = np.stack([s.peak / s.calls for s in found]).astype(np.float32)
        rows, top = _equally_many([s.rows for s in found]), _equally_many([s.top for s in found])
        return ValueRecord(one.name, one.kind, one.readers, lo, hi, count, peak, rows, top)

    def to_bytes(self) -> bytes:
        values = {name: _packed(slots) for name, slots in self.values.items()}
        return work_store.encode(_Stored(self.first, self.trajectories, self.calls, self.constant, values))

    @staticmethod
    def from_bytes(data: bytes) -> Seen:
        """Raises msgspec.MsgspecError for what to_bytes() did not make."""
        stored = work_store.decode(data, _Stored)
        values = {name: _unpacked(one) for name, one in stored.values.items()}
        return Seen(stored.first, stored.trajectories, stored.calls, stored.constant, values)


def _check_slots(count: int) -> None:
    if count > MAX_SLOTS:
        raise CalibrationError(
            f"more than {MAX_SLOTS} distinct timesteps", hint="calibrate on the sampler's own timesteps"
        )


def _merge(kept: Statistics, later: Statistics, rows: int) -> None:
    kept.lo, kept.hi = np.minimum(kept.lo, later.lo), np.maximum(kept.hi, later.hi)
    kept.peak = kept.peak + later.peak
    kept.heads = np.maximum(kept.heads, later.heads)
    kept.keys, kept.rows = _least(kept.keys, kept.rows, later.keys, later.rows, rows)
    _keep_largest(kept, later.norms, later.top)
    kept.count += later.count
    kept.calls += later.calls


def _magnitudes(value: Array, one: Observed) -> Array:
    """[H, 1] or [H, D]: the largest magnitudes along the axes one.heads."""
    if not one.heads:
        return np.zeros((0, 1), np.float32)
    others = tuple(axis for axis in range(value.ndim) if axis not in one.heads)
    largest: Array = np.maximum(value.max(axis=others), -value.min(axis=others))
    return largest.reshape(len(largest), -1)


def _sample(kept: Statistics, flat: Array, seed: int, rows: int) -> None:
    """Each row seen gets a random key; the rows with the smallest keys stay: a uniform sample without replacement."""
    keys = np.random.default_rng(seed).random(len(flat))
    kept.keys, kept.rows = _least(kept.keys, kept.rows, keys, flat, rows)


def _keep_largest(kept: Statistics, norms: Array, flat: Array) -> None:
    negative, kept.top = _least(-kept.norms, kept.top, -norms, flat, TOP)
    kept.norms = -negative


def _least(keys: Array, rows: Array, new_keys: Array, new_rows: Array, most: int) -> tuple[Array, Array]:
    """The `most` smallest of both key lists, ascending, and their rows."""
    best = np.argpartition(new_keys, most)[:most] if len(new_keys) > most else np.arange(len(new_keys))
    joint, candidates = np.concatenate([keys, new_keys[best]]), np.concatenate([rows, new_rows[best]])
    order = np.argsort(joint, kind="stable")[:most]
    return joint[order], candidates[order]


def _seed(name: str, slot: Slot, trajectory: int, call: int) -> int:
    """call: of this slot inside the trajectory."""
    which = f"{trajectory}.{call}" if call else str(trajectory)
    return int.from_bytes(hashlib.sha256(f"{name}|{slot.t!r}|{slot.branch}|{which}".encode()).digest()[:8], "little")


def _equally_many(slots: Sequence[Array]) -> Array:
    """[S, most, C]: a slot that saw fewer rows repeats its own."""
    most = max(len(rows) for rows in slots)
    return np.stack([rows[np.arange(most) % len(rows)] for rows in slots])


# -- on disk ---------------------------------------------------------------------------------------------------------


@dataclass
class _Packed:
    """All slots of one value: arrays one after the other; lengths [S, 8] of each."""

    slots: list[tuple[float, Literal["cond", "uncond"]]]
    counts: list[tuple[int, int]]  # rows and calls
    lengths: np.ndarray[Any, Any]
    arrays: list[np.ndarray[Any, Any]]


@dataclass
class _Stored:
    first: int
    trajectories: int
    calls: int
    constant: list[tuple[str, ...] | None]
    values: dict[str, _Packed]


def _packed(slots: Mapping[Slot, Statistics]) -> _Packed:
    every = [[getattr(one, name) for name in _ARRAYS] for one in slots.values()]
    lengths = np.array([[len(array) for array in arrays] for arrays in every], np.int64)
    joined = [np.concatenate(arrays) for arrays in zip(*every, strict=True)]
    return _Packed([(s.t, s.branch) for s in slots], [(s.count, s.calls) for s in slots.values()], lengths, joined)


def _unpacked(stored: _Packed) -> dict[Slot, Statistics]:
    pieces = [
        np.split(array, np.cumsum(lengths)[:-1]) for array, lengths in zip(stored.arrays, stored.lengths.T, strict=True)
    ]
    made = zip(stored.slots, stored.counts, zip(*pieces, strict=True), strict=True)
    return {Slot(t, branch): _statistics(arrays, *counts) for (t, branch), counts, arrays in made}


def _statistics(arrays: Sequence[Array], count: int, calls: int) -> Statistics:
    lo, hi, peak, rows, keys, top, norms, heads = arrays
    return Statistics(lo, hi, peak, rows, keys, top, norms, heads, count, calls)
