"""Keeps what was computed ahead for as long as what it was computed from stays the same to the last bit.

Whether it did is seen by comparing bytes with a copy, at the cost of reading the inputs once: that an array is the same
object says nothing, since a caller may have written other values into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from vdq_export.runtime.batching import Array

Values = Mapping[str, Any]  # onnxruntime's values, or torch's: both lie where they were made
_GLANCE = 4096  # bytes that are compared before the rest: inputs that differ mostly do so at once


@dataclass(eq=False)
class _Entry:
    place: str
    inputs: dict[str, Array]
    result: Future[Values] = field(default_factory=Future)
    nbytes: int = 0


class Memory:
    """Results by the graph they come from (`place`) and its inputs; those used last are kept. Thread-safe.

    most: results kept. budget: bytes of results and inputs kept beyond the `least` results that were used last.
    """

    def __init__(self, most: int, least: int, budget: int) -> None:
        self._most, self._least, self._budget = most, least, budget
        self._entries: list[_Entry] = []  # the one used last at the end
        self._lock = threading.Lock()

    def recall(self, place: str, inputs: Mapping[str, Array], run: Callable[[], Values]) -> Values:
        """What run() gives for these inputs. Called once for all threads that ask, and again after it raised."""
        with self._lock:
            entry = self._find(place, inputs)
            found = entry is not None
            if entry is None:
                # Copies: the caller may use its arrays for something else afterwards.
                entry = _Entry(place, {name: np.array(value, order="C") for name, value in inputs.items()})
            else:
                self._entries.remove(entry)
            self._entries.append(entry)
        if found:
            return entry.result.result()
        try:
            values = run()
        except BaseException as error:
            with self._lock:
                self._entries.remove(entry)
            entry.result.set_exception(error)
            raise
        held = sum(value.nbytes for value in entry.inputs.values())
        entry.nbytes = held + sum(map(_size, values.values()))
        entry.result.set_result(values)
        self._forget()
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        with self._lock:
            self._entries = [entry for entry in self._entries if not entry.result.done()]

    def _find(self, place: str, inputs: Mapping[str, Array]) -> _Entry | None:
        for entry in reversed(self._entries):
            if entry.place == place and all(_equal(entry.inputs[name], value) for name, value in inputs.items()):
                return entry
        return None

    def _forget(self) -> None:
        with self._lock:
            done = [entry for entry in self._entries if entry.result.done()]
            held = sum(entry.nbytes for entry in done)
            for place, entry in enumerate(done):
                left = len(done) - place
                if left <= self._least or (left <= self._most and held <= self._budget):
                    break
                held -= entry.nbytes
                self._entries.remove(entry)


def _size(value: Any) -> int:
    return int(value.tensor_size_in_bytes() if isinstance(value, ort.OrtValue) else value.nbytes)


def _equal(kept: Array, value: Array) -> bool:
    """To the last bit: −0 is not 0, and a NaN is itself."""
    if kept.shape != value.shape or kept.dtype != value.dtype:
        return False
    one, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (kept, value))
    return np.array_equal(one[:_GLANCE], other[:_GLANCE]) and np.array_equal(one, other)
