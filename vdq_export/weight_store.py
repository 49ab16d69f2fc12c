"""One file that holds every large constant of a bundle once, however many graphs read it.

Layout: tensors one after the other, little-endian, row-major, 4-bit types two a byte (first element in the low half).
Large ones start on a page so that a runtime can map them; equal content (type, shape, bytes) is stored once.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from vdq_export.errors import BundleError

INLINE_BYTES = 1024  # smaller constants stay in the .onnx file
PAGE = 4096
PAGED_BYTES = 16 * PAGE  # below that, page alignment would waste more than it gives: align to a cache line
LINE = 64
CHUNK_BYTES = 1 << 24
FOUR_BIT = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the store: bytes [offset, offset + length)."""

    offset: int
    length: int


class WeightStore:
    """Writes the store at `path`; `location` is what graphs call it (relative to their own folder).

    An array is taken as immutable from the moment it is put: its second use is recognised by identity, without hashing.
    As a context manager it is closed in the end, after an error without flushing.
    """

    def __init__(self, path: Path, location: str) -> None:
        self.location = location
        self._path = path
        self._file: BinaryIO | None = None
        self._size = 0
        self._digest = hashlib.sha256()
        self._by_content: dict[bytes, Stored] = {}
        self._by_identity: dict[tuple[int, int], tuple[weakref.ref[Array], Stored]] = {}

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
        for tensor in _initializers(model.graph):
            array = arrays.get(tensor.name)
            external = tensor.data_location == onnx.TensorProto.EXTERNAL
            if array is None and external:
                raise BundleError(f"no data for initializer {tensor.name!r}")
            if array is None:
                if not _worth_moving(tensor):
                    continue
                array = onnx.numpy_helper.to_array(tensor)
            _check_type(tensor, array)
            _clear_data(tensor)
            if packed_bytes(array, tensor.data_type) < INLINE_BYTES:
                tensor.raw_data = b"".join(_packed_chunks(array, tensor.data_type))
            else:
                self._reference(tensor, self.put(array, tensor.data_type))

    def put(self, array: Array, data_type: int) -> Stored:
        """Store one tensor of ONNX type `data_type`, or find it stored already."""
        key = (id(array), data_type)
        known = self._by_identity.get(key)
        if known is not None and known[0]() is array:
            return known[1]
        stored = self._append(array, data_type)
        self._by_identity[key] = (weakref.ref(array), stored)
        return stored

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
            self._file = self._path.open("wb")
        length = packed_bytes(array, data_type)
        gap = -self._size % (PAGE if length >= PAGED_BYTES else LINE)
        # Written while it is hashed: new tensors, nearly all of them, are then read once. A known one is cut off again.
        start, whole = self._size, self._digest.copy()
        content = hashlib.sha256(f"{data_type}|{tuple(array.shape)}|".encode())
        self._write(bytes(gap), whole)
        for chunk in _packed_chunks(array, data_type):
            content.update(chunk)
            self._write(chunk, whole)
        known = self._by_content.get(content.digest())
        if known is not None:
            self._file.seek(start)
            self._file.truncate()
            return known
        self._digest, self._size = whole, start + gap + length
        stored = Stored(start + gap, length)
        self._by_content[content.digest()] = stored
        return stored

    def _write(self, data: bytes, digest: hashlib._Hash) -> None:
        assert self._file is not None
        self._file.write(data)
        digest.update(data)

    def _reference(self, tensor: onnx.TensorProto, stored: Stored) -> None:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        values = {"location": self.location, "offset": str(stored.offset), "length": str(stored.length)}
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)


def packed_bytes(array: Array, data_type: int) -> int:
    """Bytes of `array` in ONNX raw-data form."""
    return (array.size + 1) // 2 if data_type in FOUR_BIT else array.size * array.dtype.itemsize


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


def _worth_moving(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type != onnx.TensorProto.STRING and tensor.ByteSize() >= INLINE_BYTES


def _check_type(tensor: onnx.TensorProto, array: Array) -> None:
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
