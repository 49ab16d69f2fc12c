"""Calibration records as files: written value by value, mapped when they are read.

One .safetensors file. Its metadata has one entry, the record's header as JSON; its tensors are called "<value>#<what>",
`what` being a field of ValueRecord. Tensors of eight bytes an element come first, so that all of them lie aligned.
Format 2 had no constant inputs, format 3 nothing about heads of attentions.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord, check_finite
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array

METADATA = "vdq-calibration"  # one entry only: safetensors writes several in random order
FORMAT, READABLE = 4, (2, 3, 4)
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_NAMES = {kind: name for name, kind in _TYPES.items()}


class _Place(NamedTuple):
    """Where a tensor lies in the file's data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int


def write(record: CalibrationRecord, path: Path) -> None:
    """Write `record` to `path`, whole or not at all; the same bytes for the same record, however it is held.

    Reads every value twice, one at a time. Raises CalibrationError.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            _write(record, file)
        partial.replace(path)
    except OSError as error:
        raise CalibrationError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _write(record: CalibrationRecord, file: BinaryIO) -> None:
    kinds = [
        (name, what, np.dtype(array.dtype).newbyteorder("<"), array.shape)
        for name, value in record.values.items()
        for what, array in value.tensors.items()
    ]
    order = sorted(kinds, key=lambda one: -one[2].itemsize)  # stable: graph order within
    ends = list(accumulate(prod(shape) * kind.itemsize for _, _, kind, shape in order))
    header: dict[str, Any] = {"__metadata__": {METADATA: json.dumps(_header(record), sort_keys=True)}}
    for (name, what, kind, shape), start, end in zip(order, [0, *ends], ends, strict=False):
        header[f"{name}#{what}"] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for size in (8, 4):
        for value in record.values.values():
            for array in value.tensors.values():
                if array.dtype.itemsize == size:
                    file.write(np.ascontiguousarray(array, np.dtype(array.dtype).newbyteorder("<")).data)


def _header(record: CalibrationRecord) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": record.model,
        "model_hash": record.model_hash,
        "graph_hash": record.graph_hash,
        "slots": [list(slot) for slot in record.slots],
        "calls": record.calls,
        "sampler": dict(record.sampler),
        "constant_inputs": list(record.constant_inputs),
        "values": [_entry(value) for value in record.values.values()],
    }


def _entry(value: ValueRecord) -> dict[str, Any]:
    return {
        "name": value.name, "kind": value.kind, "readers": value.readers,
        **({"heads": True} if value.heads is not None else {}),
    }  # fmt: skip


def read(path: Path, graph_hash: str | None) -> CalibrationRecord:
    """See CalibrationRecord.load."""
    try:
        with safe_open(path, framework="numpy") as file:  # refuses files that are cut short or inconsistent
            header = json.loads((file.metadata() or {}).get(METADATA, "{}"))
        if header.get("format") not in READABLE:
            raise CalibrationError(f"{path} is no calibration record of format {FORMAT}", hint="calibrate again")
        slots = tuple(Slot(float(t), branch) for t, branch in header["slots"])
        values = _Mapped(path, header["values"], slots)
        record = CalibrationRecord(
            model=header["model"],
            model_hash=header["model_hash"],
            graph_hash=header["graph_hash"],
            slots=slots,
            values=values,
            calls=header["calls"],
            sampler=header["sampler"],
            constant_inputs=tuple(header.get("constant_inputs", ())),
            origin=str(path),
        )
        if graph_hash is not None:
            record.check(graph_hash)
        values.check_shapes()
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} is missing or damaged: {error}", hint="calibrate again") from error
    return record


class _Mapped(Mapping[str, ValueRecord]):
    """The values of a file; what was asked for stays, as views of the mapping."""

    def __init__(self, path: Path, entries: list[dict[str, Any]], slots: tuple[Slot, ...]) -> None:
        self._path, self._slots = path, slots
        self._entries = {entry["name"]: entry for entry in entries}
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            places = json.loads(file.read(length))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._places = {
            name: _Place(_TYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
            for name, one in places.items()
            if name != "__metadata__"
        }
        self._read: dict[str, ValueRecord] = {}

    def __getitem__(self, name: str) -> ValueRecord:
        if name not in self._read:
            entry = self._entries[name]
            arrays = {what: self._array(self._places[f"{name}#{what}"]) for what in _kinds(entry)}
            value = ValueRecord(name, entry["kind"], tuple(entry["readers"]), **arrays)
            check_finite(value, self._slots, str(self._path))
            self._read[name] = value
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _array(self, place: _Place) -> Array:
        if not prod(place.shape):
            return np.zeros(place.shape, place.dtype)
        return np.frombuffer(self._map, place.dtype, prod(place.shape), place.start).reshape(place.shape)

    def check_shapes(self) -> None:
        """Raises ValueError where arrays do not fit the slots, KeyError for missing ones; reads no array."""
        slots = len(self._slots)
        for name, entry in self._entries.items():
            shapes = {what: self._places[f"{name}#{what}"].shape for what in _kinds(entry)}
            lo = shapes["lo"]
            if len(lo) != 2 or lo[0] != slots or shapes["hi"] != lo or shapes["count"] != (slots,):
                raise ValueError(f"{name}: shapes do not fit {slots} slots")
            for what in shapes.keys() & {"peak", "rows", "top"}:
                dimensions = 2 if what == "peak" else 3
                if len(shapes[what]) != dimensions or (shapes[what][0], shapes[what][-1]) != lo:
                    raise ValueError(f"{name}: sampled rows do not fit {slots} slots")
            if "heads" in shapes and (len(shapes["heads"]) != 3 or shapes["heads"][0] != slots):
                raise ValueError(f"{name}: magnitudes of heads do not fit {slots} slots")


def _kinds(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The arrays of a value; see ValueRecord."""
    more = ("peak", "rows", "top") if entry["kind"] == "linear" else ("heads",) if entry.get("heads") else ()
    return ("lo", "hi", "count", *more)
