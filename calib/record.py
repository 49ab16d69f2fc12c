"""What calibration saw, per observed value and timestep: enough to choose any bins, ranges and smoothing later.

Legend: S slots (distinct timestep × guidance branch, in denoising order: highest t first), C channels (last dimension),
n sampled token rows a slot, m top rows. A record is tied to one float graph by `graph_hash`.

A file is mapped, not read: a value's arrays are views of it, checked for NaN and Inf when the value is first asked for,
so that a record may be larger than memory (record_file.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph, release

if TYPE_CHECKING:
    from vdq_export.model import Model


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
    Attention operands have none of the three; where they have heads, they have `heads`: the largest magnitude of each
    head, [S, H, 1], of values (V) of each channel of each head, [S, H, D].
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
    heads: Array | None = None

    @property
    def channels(self) -> int:
        return int(self.lo.shape[1])

    @cached_property
    def tensors(self) -> dict[str, Array]:
        named = {name: getattr(self, name) for name in ("lo", "hi", "count", "peak", "rows", "top", "heads")}
        return {name: array for name, array in named.items() if array is not None}

    def linear(self) -> tuple[Array, Array]:
        """(peak[S, C], rows[S, n, C]). Raises CalibrationError when the value was not observed as a linear input."""
        if self.peak is None or self.rows is None:
            raise CalibrationError(f"{self.name} was not calibrated as the input of a linear", hint="calibrate again")
        return self.peak, self.rows

    def sample(self, slots: Sequence[int], top: bool = False, most: int | None = None) -> Array:
        """The rows drawn in some slots, slot by slot, [rows, C]; with `top`, each slot's largest ones before them.

        most: of the rows drawn, evenly, no more than so many; no others are read then. Raises CalibrationError as
        linear() does.
        """
        _, rows = self.linear()
        index, each = np.asarray(slots), rows.shape[1]
        if most is not None:
            places = np.unique(np.linspace(0, len(index) * each - 1, min(len(index) * each, most)).astype(np.int64))
            few: Array = rows[index[places // each], places % each]
            return few
        picked = rows[index]
        if top and self.top is not None:
            picked = np.concatenate([self.top[np.asarray(slots)], picked], axis=1)
        flat: Array = picked.reshape(-1, self.channels)
        return flat


@dataclass(frozen=True)
class CalibrationRecord:
    """All observed values of one float graph. `sampler` holds the settings of the loop that made the trajectories.

    constant_inputs: inputs of the network that were equal to the last bit at all steps of a guidance branch in every
    trajectory; () where nothing shows it. A record without calls is for recipes that need no data.
    """

    model: str
    model_hash: str
    graph_hash: str
    slots: tuple[Slot, ...]
    values: Mapping[str, ValueRecord]
    calls: int  # how often the network was run
    sampler: Mapping[str, Any] = field(default_factory=dict)
    constant_inputs: tuple[str, ...] = ()
    origin: str = field(default="calibration record", compare=False)  # the file it was read from, for messages

    @staticmethod
    def empty(graph: Graph, model: Model) -> CalibrationRecord:
        """What a recipe that needs no data starts from: no values, the network never run.

        Its slots are the sampler's own `timesteps` where it tells them, else there are none.
        """
        sampler = {} if model.sampler is None else dict(model.sampler.settings())
        timesteps = sorted({float(t) for t in getattr(model.sampler, "timesteps", ())}, reverse=True)
        slots = tuple(Slot(t, "cond") for t in timesteps)
        return CalibrationRecord(model.name, graph.source, graph.hash(), slots, {}, 0, sampler)

    @property
    def has_data(self) -> bool:
        """Whether the network was run."""
        return self.calls > 0

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
        """Raises CalibrationError for a value that was not observed, and for NaN or Inf in a file's arrays."""
        if name not in self.values:
            if not self.has_data:
                raise CalibrationError(
                    f"there is no calibration data about {name!r}", hint="this recipe needs data: calibrate"
                )
            raise CalibrationError(f"the calibration record holds nothing about {name!r}", hint="calibrate this model")
        return self.values[name]

    def save(self, path: Path) -> None:
        """Write one .safetensors file, whole or not at all, value by value. Raises CalibrationError."""
        from vdq_export.calib import record_file

        record_file.write(self, path)

    @staticmethod
    def load(path: Path, graph_hash: str | None = None) -> CalibrationRecord:
        """Map and check a record; with `graph_hash`, that it belongs to that graph too.

        Raises CalibrationError for a file that is missing, truncated, no record, or of another model.
        """
        from vdq_export.calib import record_file

        return record_file.read(path, graph_hash)


def check_finite(value: ValueRecord, slots: Sequence[Slot], origin: str) -> None:
    """Raises CalibrationError naming value, layer and timestep of the first NaN or Inf."""
    for what, array in value.tensors.items():
        for index in range(len(array)):  # slot by slot: a mask of a whole array may be a quarter of it
            if not np.isfinite(array[index]).all():
                raise not_finite(value.name, value.readers, slots[index], f"{origin} ({what})")
        release(array)


def not_finite(name: str, readers: Sequence[str], slot: Slot, where: str) -> CalibrationError:
    layers = ", ".join(readers[:3]) or name
    return CalibrationError(
        f"NaN or Inf in the input of {layers} at {slot}: value {name}, {where}",
        hint="check the model's weights and inputs in float32",
    )
