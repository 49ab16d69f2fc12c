"""Weights that stay in their files: safetensors, one file or shards, mapped and read when somebody looks at them.

Arrays are views of the files' pages and take no memory of their own; bfloat16 is ml_dtypes'. Whoever goes through all
of them gives the pages back as he goes (graph.release).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vdq_export.errors import ModelError
from vdq_export.graph import Array
from vdq_export.weights.external_data import open_many_files

TYPES: Mapping[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_CHUNK = 1 << 22  # bytes hashed at a time: they stay in cache for the look at NaN that follows
_INTEGER = {2: np.uint16, 4: np.uint32, 8: np.uint64}
# Bits of exponent: all of them set is what NaN and Inf have in common.
_EXPONENT = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}


@dataclass(frozen=True)
class Stored:
    """One tensor: `kind` is safetensors' name of its type, offset that of its first byte in `file`."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its bytes in the file."""
        found: np.dtype[Any] = np.dtype(TYPES[self.kind])
        return found

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize

    def mapped(self) -> Array:
        """The tensor as it lies in the file, read-only."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        array = np.memmap(self.file, self.dtype, "r", self.offset, self.shape)
        return array if array.flags.aligned else array.copy()


class Checkpoint(Mapping[str, Array]):
    """Mapped arrays by name, the same object each time.

    aliases: further names of tensors, as of parameters that several modules share; they are no entries of their own.
    """

    def __init__(self, tensors: Mapping[str, Stored], aliases: Mapping[str, str] | None = None) -> None:
        self.tensors = dict(tensors)
        self.aliases = dict(aliases or {})
        self._mapped: dict[str, Array] = {}
        open_many_files()

    @staticmethod
    def open(files: Iterable[Path]) -> Checkpoint:
        """Every tensor of `files`. Raises ModelError for a file that is no whole safetensors file, and for a tensor
        that two of them hold."""
        found: dict[str, Stored] = {}
        for file in files:
            for name, stored in read_header(file).items():
                if name in found:
                    raise ModelError(f"tensor {name} is in {found[name].file} and in {file}", hint="keep one of them")
                found[name] = stored
        return Checkpoint(found)

    def __getitem__(self, name: str) -> Array:
        name = self.aliases.get(name, name)
        if name not in self._mapped:
            self._mapped[name] = self.tensors[name].mapped()
        return self._mapped[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would map the tensor
        return name in self.tensors or name in self.aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(one.nbytes for one in self.tensors.values())

    @property
    def nbytes_computed(self) -> int:
        """Bytes of all tensors in the types they are computed in: float32 for every float."""
        return sum(4 * prod(x.shape) if x.kind in _EXPONENT else x.nbytes for x in self.tensors.values())

    @cached_property
    def digests(self) -> Mapping[str, bytes]:
        """{name: sha256 of type, shape and bytes}, read once, several tensors at a time.

        Raises ModelError naming the tensor that holds NaN or Inf.
        """
        order = sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # hashing lets other threads run
            found = list(pool.map(lambda item: _digest(*item), order))
        return dict(zip((name for name, _ in order), found, strict=True))

    def identity(self, name: str) -> bytes:
        """The digest of one tensor; tensors of equal type, shape and bytes have the same."""
        return self.digests[self.aliases.get(name, name)]

    def digest(self) -> str:
        """sha256 over names, types, shapes and bytes of all tensors. Raises ModelError for NaN and Inf."""
        total = hashlib.sha256()
        for name, digest in sorted(self.digests.items()):
            total.update(f"{name}|".encode() + digest)
        return total.hexdigest()


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds. Raises ModelError for a file that is not whole, or of types unknown here."""
    try:
        with safe_open(file, framework="numpy"):  # which checks every offset against the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}", hint="fetch it again") from error
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in TYPES:
            raise ModelError(
                f"{file}: tensor {name} is of type {entry['dtype']}, which is not known here",
                hint="save the unquantized weights as F32, F16 or BF16",
            )
        found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return found


def _digest(name: str, stored: Stored) -> bytes:
    """The digest of one tensor, read past the mapping: its pages never count as this process's."""
    digest = hashlib.sha256(f"{stored.kind}|{stored.shape}|".encode())
    buffer = bytearray(min(_CHUNK, stored.nbytes))
    left = stored.nbytes
    with stored.file.open("rb", buffering=0) as stream:
        stream.seek(stored.offset)
        while left:
            got = stream.readinto(memoryview(buffer)[:left])
            # A short read may end inside a number; what it misses comes with the next one.
            while got % stored.dtype.itemsize and got < left:
                more = stream.read(stored.dtype.itemsize - got % stored.dtype.itemsize)
                if not more:
                    break
                buffer[got : got + len(more)] = more
                got += len(more)
            if not got or got % stored.dtype.itemsize:
                raise ModelError(f"{stored.file} was cut short while it was read", hint="fetch it again")
            piece = memoryview(buffer)[:got]
            digest.update(piece)
            if stored.kind in _EXPONENT and not _finite(piece, stored):
                raise ModelError(f"{stored.file}: weight {name} holds NaN or Inf", hint="fix the checkpoint")
            left -= got
    return digest.digest()


def _finite(piece: memoryview, stored: Stored) -> bool:
    exponent = _EXPONENT[stored.kind]
    bits = np.frombuffer(piece, _INTEGER[stored.dtype.itemsize])
    return bool((bits & bits.dtype.type(exponent)).max(initial=0) < exponent)
