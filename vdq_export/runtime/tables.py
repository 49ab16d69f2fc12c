"""What depends on the timestep only, computed for the calibrated timesteps: a row for each, read when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from vdq_export.runtime.batching import Array
from vdq_export.schedule import EDGE_TOLERANCE


class Tables:
    """The tables in `file`, which stays mapped: {value: [rows, …]}, a row for each of `timesteps`."""

    def __init__(self, file: Path, timesteps: Sequence[float]) -> None:
        self._open = cast(Any, safe_open(file, framework="numpy"))
        self._timesteps = tuple(timesteps)
        self.values: frozenset[str] = frozenset(self._open.keys())

    def row(self, t: float) -> int | None:
        """The number of the row for t, which may be off as far as a float32 of it is."""
        close = (i for i, one in enumerate(self._timesteps) if abs(one - t) <= EDGE_TOLERANCE * max(1.0, abs(t)))
        return next(close, None)

    def nearest(self, t: float) -> int:
        """The number of the row whose timestep is nearest to t, of two the one with the higher."""
        return min(range(len(self._timesteps)), key=lambda row: (abs(self._timesteps[row] - t), row))

    def timestep(self, row: int) -> float:
        return self._timesteps[row]

    def read(self, value: str, row: int) -> Array:
        """[…] of one value, contiguous."""
        found: Array = self._open.get_slice(value)[row : row + 1]
        return found.reshape(found.shape[1:])
