"""One file that holds every large constant of a bundle once, however many graphs read it.

Layout: tensors one after the other, little-endian, row-major, 4-bit types two a byte (first element in the low half).
Large ones start on a page so that a runtime can map them; equal content (type, shape, bytes) is stored once.

Promises are computed when they are written, the next ones meanwhile in other threads, and settled then: whoever reads
them later (graphs of other bins, hand-off files, checks) reads this file's pages.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from vdq_export.errors import BundleError
from vdq_export.weights.external_data import open_many_files
from vdq_export.weights.promise import Arrays, Promise, ahead, read, release

INLINE_BYTES = 1024  # smaller constants stay in the .onnx file
PAGE = 4096
PAGED_BYTES = 16 * PAGE  # below that, page alignment would waste more than it gives: align to a cache line
LINE = 64
CHUNK_BYTES = 1 << 24
AHEAD = 4  # promises computed meanwhile: one of a 14 B model takes up to a gigabyte
_END = 64  # bytes at both ends of each chunk, by which tensors that may be equal are found
FOUR_BIT = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the store: bytes [offset, offset + length)."""

    offset: int
    length: int


class WeightStore:
    """Writes the store at `path`; `location` is what graphs call it (relative to their own folder).

    An array is taken as immutable from the moment it is put: its second use is recognised by identity, without reading
    it; a promise likewise.
    As a context manager it is closed in the end, after an error without flushing.
    """

    def __init__(self, path: Path, location: str) -> None:
        self.location = location
        self._path = path
        self._file: BinaryIO | None = None
        self._size = 0
        self._digest = hashlib.sha256()
        self._by_ends: dict[bytes, list[Stored]] = {}
        self._by_identity: dict[tuple[int, int], tuple[weakref.ref[Any], Stored]] = {}
        open_many_files()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    @property
    def path(self) -> Path | None:
        """The file, or None while nothing was stored."""
        return self._path if self._file else None

    def externalise(self, model: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
        """Move the initializers of `model` into the store; edits `model` in place.

        Data comes from `arrays` by initializer name, else from the proto. Tensors below INLINE_BYTES stay inside.
        Raises BundleError for a placeholder without an array and for an array of another shape or type.
        """
        held = arrays.held if isinstance(arrays, Arrays) else arrays
        moved = list[tuple[onnx.TensorProto, Any]]()
        for tensor in _initializers(model.graph):
            values = held.get(tensor.name)
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if values is None and external:
                raise BundleError(f"no data for initializer {tensor.name!r}")
            if values is not None or _worth_moving(tensor):
                values = onnx.numpy_helper.to_array(tensor) if values is None else values
                _check_type(tensor, values)
                moved.append((tensor, values))
        new = {(id(v), t.data_type): v for t, v in moved if self._known(v, t.data_type) is None}
        computed = ahead(list(new.values()), threads=min(AHEAD, os.cpu_count() or 1))
        for tensor, values in moved:
            array = None if new.pop((id(values), tensor.data_type), None) is None else next(computed)
            _clear_data(tensor)
            if packed_bytes(values, tensor.data_type) < INLINE_BYTES:
                tensor.raw_data = b"".join(_packed_chunks(read(values), tensor.data_type))
            else:
                self._reference(tensor, self.put(values, tensor.data_type, array))

    def put(self, values: Any, data_type: int, computed: Array | None = None) -> Stored:
        """Store one tensor (array or promise) of ONNX type `data_type`, or find it stored already.

        computed: what the promise is. It is settled: its values are those in the file from now on.
        """
        stored = self._known(values, data_type)
        if stored is None:
            stored = self._append(read(values) if computed is None else computed, data_type)
            self._by_identity[id(values), data_type] = (weakref.ref(values), stored)
            if isinstance(values, Promise) and not values.is_settled and os.name == "posix":
                values.settle(self._in_file(stored, values, data_type))  # elsewhere mapped files cannot be moved
        return stored

    def _known(self, values: Any, data_type: int) -> Stored | None:
        known = self._by_identity.get((id(values), data_type))
        return known[1] if known is not None and known[0]() is values else None

    def _in_file(self, stored: Stored, values: Promise, data_type: int) -> Callable[[], Array]:
        """What reads a stored tensor again. It is mapped at once: the folder is renamed in the end."""
        assert self._file is not None
        self._file.flush()
        shape, dtype = values.shape, values.dtype
        if data_type in FOUR_BIT:
            packed = np.memmap(self._path, np.uint8, "r", stored.offset, (stored.length,))
            return lambda: _unpack_four_bit(packed, shape, dtype)
        kept = np.memmap(self._path, dtype, "r", stored.offset, shape)
        return lambda: kept

    def flush(self) -> None:
        """Let others read what was put."""
        if self._file:
            self._file.flush()

    def close(self) -> tuple[int, str]:
        """Flush to disk; returns (size, sha256) of the store."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._size, self._digest.hexdigest()

    def abandon(self) -> None:
        """Close without flushing to disk."""
        if self._file:
            self._file.close()

    def _append(self, array: Array, data_type: int) -> Stored:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb+")
        length = packed_bytes(array, data_type)
        gap = -self._size % (PAGE if length >= PAGED_BYTES else LINE)
        # Written while it is hashed: new tensors, nearly all of them, are then read once. A known one is cut off again.
        start, whole = self._size, self._digest.copy()
        ends = hashlib.sha256(f"{data_type}|{tuple(array.shape)}|".encode())
        self._write(bytes(gap), whole)
        for chunk in _packed_chunks(array, data_type):
            ends.update(chunk[:_END])
            ends.update(chunk[-_END:])
            self._write(chunk, whole)
        release(array)
        stored = Stored(start + gap, length)
        alike = self._by_ends.setdefault(ends.digest(), [])
        for known in alike:
            if self._same(known, stored):
                self._file.seek(start)
                self._file.truncate()
                return known
        self._digest, self._size = whole, start + gap + length
        alike.append(stored)
        return stored

    def _same(self, one: Stored, other: Stored) -> bool:
        """Whether two stretches of the file, of the same type and shape, hold the same bytes."""
        assert self._file is not None
        same = True
        for done in range(0, one.length, CHUNK_BYTES):
            count, pieces = min(CHUNK_BYTES, one.length - done), []
            for stored in (one, other):
                self._file.seek(stored.offset + done)
                pieces.append(self._file.read(count))
            same = same and pieces[0] == pieces[1]
            if not same:
                break
        self._file.seek(0, os.SEEK_END)
        return same

    def _write(self, data: bytes, digest: hashlib._Hash) -> None:
        assert self._file is not None
        self._file.write(data)
        digest.update(data)

    def _reference(self, tensor: onnx.TensorProto, stored: Stored) -> None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        values = {"location": self.location, "offset": str(stored.offset), "length": str(stored.length)}
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)


def packed_bytes(values: Any, data_type: int) -> int:
    """Bytes of an array or a promise in ONNX raw-data form."""
    size: int = prod(values.shape)
    return (size + 1) // 2 if data_type in FOUR_BIT else size * int(values.dtype.itemsize)


def _packed_chunks(array: Array, data_type: int) -> Iterator[bytes]:
    """The raw-data bytes of `array`, row-major, in pieces; strided and mapped arrays are never copied whole."""
    four_bit = data_type in FOUR_BIT
    if not array.size:
        return
    if array.ndim == 0 or (four_bit and array[0].size % 2):
        array = array.reshape(1, -1)  # rows of odd length share bytes: take such a tensor in one piece
    rows = max(1, CHUNK_BYTES // array[0].nbytes)
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows])
        yield _pack_four_bit(piece) if four_bit else _little_endian(piece).tobytes()


def _little_endian(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _pack_four_bit(array: Array) -> bytes:
    # .view: int4, uint4 and float4 arrays hold one value a byte, its bits in the low half.
    nibbles = array.reshape(-1).view(np.uint8) & 0x0F
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def _unpack_four_bit(packed: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    nibbles = np.empty(2 * packed.size, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0x0F, packed >> 4
    if np.dtype(dtype).name == "int4":  # held with its sign in all eight bits
        nibbles = ((nibbles.view(np.int8) << 4) >> 4).view(np.uint8)
    values: Array = nibbles[: prod(shape)].view(dtype).reshape(shape)
    return values


def _worth_moving(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type != onnx.TensorProto.STRING and tensor.ByteSize() >= INLINE_BYTES


def _check_type(tensor: onnx.TensorProto, array: Any) -> None:
    if tuple(array.shape) != tuple(tensor.dims):
        raise BundleError(f"initializer {tensor.name!r} is {tuple(tensor.dims)}, its data {tuple(array.shape)}")
    expected = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if array.dtype.itemsize != expected.itemsize or array.dtype.hasobject:
        raise BundleError(f"initializer {tensor.name!r} is {expected}, its data {array.dtype}")


def _clear_data(tensor: onnx.TensorProto) -> None:
    typed = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    for field in ("raw_data", "external_data", "data_location", *typed):
        tensor.ClearField(field)


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs] if attribute.type in (5, 10) else []:
                yield from _initializers(inner)
