"""What calibration saw, per observed value and timestep: enough to choose any bins, ranges and smoothing later.

Legend: S slots (distinct timestep × guidance branch, in denoising order: highest t first), C channels (last dimension),
n sampled token rows a slot, m top rows. A record is tied to one float graph by `graph_hash`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vdq_export.errors import CalibrationError
from vdq_export.graph import Array

METADATA = "vdq-calibration"  # one entry only: safetensors writes several in random order
FORMAT = 2


class Slot(NamedTuple):
    """One calibrated (timestep, guidance branch)."""

    t: float
    branch: Literal["cond", "uncond"]

    def __str__(self) -> str:
        return f"timestep {self.t:g} ({self.branch})"


def denoising_order(slot: Slot) -> tuple[float, str]:
    """Sort key: highest t first, cond before uncond."""
    return (-slot.t, slot.branch)


@dataclass(frozen=True)
class ValueRecord:
    """Statistics of one graph value over the whole calibration set.

    lo, hi: exact minimum and maximum, [S, C]. count: token rows seen, [S]. Linear inputs also have peak: mean over
    the slot's calls and their samples of max over tokens of |x[:, c]|, [S, C]; rows: token rows drawn without
    replacement, [S, n, C]; and top: those of largest L2 norm, largest first, [S, m, C] (a slot with fewer rows repeats
    its own). A rotation keeps a row's norm but not where its extremes are: then `top` says how far values reach.
    Attention operands have none of the three.
    """

    name: str
    kind: Literal["linear", "attention"]
    readers: tuple[str, ...]  # layers (linear) or nodes (attention) that read the value
    lo: Array
    hi: Array
    count: Array
    peak: Array | None = None
    rows: Array | None = None
    top: Array | None = None

    @property
    def channels(self) -> int:
        return int(self.lo.shape[1])

    @cached_property
    def tensors(self) -> dict[str, Array]:
        named = {name: getattr(self, name) for name in ("lo", "hi", "count", "peak", "rows", "top")}
        return {name: array for name, array in named.items() if array is not None}

    def linear(self) -> tuple[Array, Array]:
        """(peak[S, C], rows[S, n, C]). Raises CalibrationError when the value was not observed as a linear input."""
        if self.peak is None or self.rows is None:
            raise CalibrationError(f"{self.name} was not calibrated as the input of a linear", hint="calibrate again")
        return self.peak, self.rows

    def sample(self, slots: Sequence[int], top: bool = False) -> Array:
        """The rows drawn in some slots, slot by slot, [rows, C]; with `top`, each slot's largest ones before them.

        Raises CalibrationError as linear() does.
        """
        _, rows = self.linear()
        picked = rows[np.asarray(slots)]
        if top and self.top is not None:
            picked = np.concatenate([self.top[np.asarray(slots)], picked], axis=1)
        flat: Array = picked.reshape(-1, self.channels)
        return flat


@dataclass(frozen=True)
class CalibrationRecord:
    """All observed values of one float graph. `sampler` holds the settings of the loop that made the trajectories."""

    model: str
    model_hash: str
    graph_hash: str
    slots: tuple[Slot, ...]
    values: Mapping[str, ValueRecord]
    calls: int  # how often the network was run
    sampler: Mapping[str, Any] = field(default_factory=dict)
    origin: str = field(default="calibration record", compare=False)  # the file it was read from, for messages

    @property
    def steps(self) -> tuple[float, ...]:
        """Distinct timesteps, descending."""
        return tuple(sorted({s.t for s in self.slots}, reverse=True))

    def check(self, graph_hash: str) -> None:
        """Raises CalibrationError unless the record was made from the graph with that hash."""
        if graph_hash != self.graph_hash:
            raise CalibrationError(
                f"{self.origin} is of another model: made for graph {self.graph_hash[:12]} ({self.model}), "
                f"this is {graph_hash[:12]}",
                hint="calibrate this model",
            )

    def value(self, name: str) -> ValueRecord:
        if name not in self.values:
            raise CalibrationError(f"the calibration record holds nothing about {name!r}", hint="calibrate this model")
        return self.values[name]

    def check_finite(self, origin: str = "calibration record") -> None:
        """Raises CalibrationError naming value, layer and timestep of the first NaN or Inf."""
        for value in self.values.values():
            for what, array in value.tensors.items():
                if not np.isfinite(array).all():
                    bad = int(np.argwhere(~np.isfinite(array))[0][0])
                    raise not_finite(value.name, value.readers, self.slots[bad], f"{origin} ({what})")

    def save(self, path: Path) -> None:
        """Write one .safetensors file, whole or not at all."""
        header = {
            "format": FORMAT,
            "model": self.model,
            "model_hash": self.model_hash,
            "graph_hash": self.graph_hash,
            "slots": [list(slot) for slot in self.slots],
            "calls": self.calls,
            "sampler": dict(self.sampler),
            "values": [{"name": v.name, "kind": v.kind, "readers": v.readers} for v in self.values.values()],
        }
        tensors = {
            f"{v.name}#{what}": np.ascontiguousarray(a) for v in self.values.values() for what, a in v.tensors.items()
        }
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, {METADATA: json.dumps(header, sort_keys=True)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write {path}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: Path, graph_hash: str | None = None) -> CalibrationRecord:
        """Read and check a record; with `graph_hash`, that it belongs to that graph too.

        Raises CalibrationError for a file that is missing, truncated, no record, of another model, or not finite.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads((file.metadata() or {}).get(METADATA, "{}"))
                if header.get("format") != FORMAT:
                    raise CalibrationError(f"{path} is no calibration record of format {FORMAT}")
                if graph_hash is not None:  # before reading what may be gigabytes
                    _build(header, {}, path).check(graph_hash)
                arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            values = {e["name"]: _value(e, arrays, len(header["slots"])) for e in header["values"]}
            record = _build(header, values, path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is missing or damaged: {error}", hint="calibrate again") from error
        record.check_finite(str(path))
        return record


def not_finite(name: str, readers: Sequence[str], slot: Slot, where: str) -> CalibrationError:
    layers = ", ".join(readers[:3]) or name
    return CalibrationError(
        f"NaN or Inf in the input of {layers} at {slot}: value {name}, {where}",
        hint="check the model's weights and inputs in float32",
    )


def _build(header: dict[str, Any], values: Mapping[str, ValueRecord], path: Path) -> CalibrationRecord:
    return CalibrationRecord(
        model=header["model"],
        model_hash=header["model_hash"],
        graph_hash=header["graph_hash"],
        slots=tuple(Slot(float(t), branch) for t, branch in header["slots"]),
        values=values,
        calls=header["calls"],
        sampler=header["sampler"],
        origin=str(path),
    )


def _value(entry: dict[str, Any], arrays: Mapping[str, Array], slots: int) -> ValueRecord:
    name, linear = entry["name"], entry["kind"] == "linear"
    lo, hi, count = (arrays[f"{name}#{what}"] for what in ("lo", "hi", "count"))
    peak, rows, top = (arrays[f"{name}#{what}"] if linear else None for what in ("peak", "rows", "top"))
    if lo.ndim != 2 or lo.shape[0] != slots or hi.shape != lo.shape or count.shape != (slots,):
        raise ValueError(f"{name}: shapes do not fit {slots} slots")
    shapes = [a.shape[:: a.ndim - 1] for a in (peak, rows, top) if a is not None]  # slots and channels of each
    if any(shape != lo.shape for shape in shapes):
        raise ValueError(f"{name}: sampled rows do not fit {slots} slots")
    return ValueRecord(name, entry["kind"], tuple(entry["readers"]), lo, hi, count, peak, rows, top)
