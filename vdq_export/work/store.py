"""Results of finished work, kept on disk until the bundle is written, so that a killed export goes on where it was.

A unit's result lies under the hash of everything it depends on: key(). Whatever changes (an input, a setting, this
package's code, a library that computes) changes the key, so nothing stale is ever found and nothing needs invalidating.

Layout: FOLDER/units/ab/<key>, each file CHECKSUM (32 bytes, sha256 of the rest) and the data; FOLDER/users/, one empty
file for each process that uses the folder. Files appear by renaming ones that are complete and flushed, so a kill
leaves no half entry under a key; one that is damaged all the same has the wrong checksum and counts as absent.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import platform
import re
import secrets
import shutil
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import numpy as np
import psutil

from vdq_export.disk import sync_folder
from vdq_export.errors import VdqError

T = TypeVar("T")
FORMAT = 1  # of the entries
_CHECKSUM = hashlib.sha256().digest_size
_COMPUTE = ("diffusers", "numpy", "onnxruntime", "torch")  # libraries whose versions decide last bits
# In a checkout these are folders beside the package.
_PACKAGES = ("vdq_export", *(f"vdq_export.{name}" for name in ("calib", "passes", "samples", "targets")))
_ARRAY = 1  # msgpack's number for our extension


class WorkStoreError(VdqError):
    """The folder of finished work cannot be written."""


class WorkStore:
    """Bytes by key in `folder`, which is made when the first entry is put. A context manager: close() at the end.

    Any number of processes may use one folder: equal keys hold equal data. `hits`, `misses`: of get(), so far.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100  (of a link, the link)
        self.hits = self.misses = 0
        self.seconds = 0.0  # spent reading and writing
        self._mark = self.folder / "users" / f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> WorkStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: str) -> bytes | None:
        """What was put under `key`; None where nothing was, or what is there is damaged."""
        began = time.monotonic()
        try:
            data = self._place(key).read_bytes()
        except OSError:
            data = b""
        body = memoryview(data)[_CHECKSUM:]
        found = bytes(body) if data and hashlib.sha256(body).digest() == data[:_CHECKSUM] else None
        self.hits += found is not None
        self.misses += found is None
        self.seconds += time.monotonic() - began
        return found

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`; on return it survives a kill and a power cut. Raises WorkStoreError for a disk that is full."""
        began, place = time.monotonic(), self._place(key)
        partial = place.with_name(f"{place.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            self._announce()
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(place)
            sync_folder(place.parent)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise WorkStoreError(
                f"cannot keep finished work in {self.folder}: {error.strerror or error}",
                hint="--work DIR puts it elsewhere",
            ) from error
        self.seconds += time.monotonic() - began

    def drop(self, key: str) -> None:
        """Forget an entry that nothing will ask for again; blocks.py's activations would fill the disk."""
        with suppress(OSError):
            self._place(key).unlink()

    def close(self) -> None:
        """This process is done; the entries stay for the next one."""
        with suppress(OSError):
            self._mark.unlink()
        for folder in (self._mark.parent, self.folder):  # those that hold nothing
            with suppress(OSError):
                folder.rmdir()

    def clear(self) -> None:
        """Done for good: remove the folder, unless another process is still using it, which then removes it.

        Nothing but what a WorkStore put there is removed.
        """
        self.close()
        if any(self._others()):
            return
        aside = self.folder.with_name(f"{self.folder.name}.cleared-{secrets.token_hex(4)}")
        with suppress(OSError):
            if {one.name for one in self.folder.iterdir()} <= {"units", "users"}:
                self.folder.rename(aside)  # at once: a process that comes now finds nothing rather than less and less
        for place in self.folder.parent.glob(f"{glob.escape(self.folder.name)}.cleared-*"):  # of killed processes too
            shutil.rmtree(place, ignore_errors=True)

    def _others(self) -> list[Path]:
        """Marks of processes that live, as far as this machine can know; of dead ones they are removed."""
        alive = []
        for place in sorted(self._mark.parent.glob("*")) if self._mark.parent.is_dir() else []:
            found = re.fullmatch(rf"{_host()}-(\d+)-[0-9a-f]+", place.name)
            if found and not psutil.pid_exists(int(found[1])):
                with suppress(OSError):
                    place.unlink()
            else:
                alive.append(place)
        return alive

    def _announce(self) -> None:
        if not self._mark.exists():  # again where another process cleared the folder
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            self._mark.touch()

    def _place(self, key: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"{key!r} is no key")
        return self.folder / "units" / key[:2] / key


# -- keys ------------------------------------------------------------------------------------------------------------


def key(*parts: Any) -> str:
    """sha256 over `parts` and everything that computes: this package's code, the libraries' versions.

    Parts: None, bool, int, float, str, bytes, arrays and numpy's numbers, tuples, lists, dicts (by sorted keys),
    dataclasses and msgspec structs. Different values never have the same form. TypeError for anything else.
    """
    digest = hashlib.sha256(f"{FORMAT}|{code_version()}|".encode())
    _feed(digest, parts)
    return digest.hexdigest()


@cache
def code_version() -> str:
    """Hash of this package's sources and the versions of what they compute with."""
    packages = [importlib.import_module(name) for name in _PACKAGES]
    digest = hashlib.sha256()
    for folder in sorted({folder for package in packages for folder in package.__path__}):
        for place in sorted(Path(folder).rglob("*.py")):
            digest.update(place.relative_to(folder).as_posix().encode() + b"\0" + place.read_bytes() + b"\0")
    for name in _COMPUTE:
        digest.update(f"{name} {importlib.import_module(name).__version__}|".encode())
    return digest.hexdigest()


def _feed(digest: Any, part: Any) -> None:
    """A tag for the type, a length where it varies, the content."""
    if part is None or isinstance(part, bool | int | float | str | np.generic):
        plain = part.item() if isinstance(part, np.generic) else part
        text = repr(plain).encode()
        digest.update(f"{type(plain).__name__}{len(text)}:".encode() + text)
    elif isinstance(part, bytes | bytearray | memoryview):
        digest.update(f"bytes{len(part)}:".encode())
        digest.update(part)
    elif isinstance(part, np.ndarray):
        digest.update(f"array{part.dtype.name}{part.shape}:".encode())
        digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    elif isinstance(part, dict):
        digest.update(f"dict{len(part)}:".encode())
        for name in sorted(part):
            _feed(digest, name)
            _feed(digest, part[name])
    elif isinstance(part, tuple | list):
        digest.update(f"list{len(part)}:".encode())
        for one in part:
            _feed(digest, one)
    else:
        names = _fields(part)
        digest.update(f"{type(part).__name__}{len(names)}:".encode())
        for name in names:
            _feed(digest, name)
            _feed(digest, getattr(part, name))


def _fields(part: Any) -> list[str]:
    fields = getattr(part, "__struct_fields__", None) or getattr(part, "__dataclass_fields__", None)
    if fields is None or isinstance(part, type):
        raise TypeError(f"{type(part).__name__} cannot be part of a key")
    return list(fields)


# -- what results look like on disk ----------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Dataclasses, structs, tuples, plain values and arrays of any type, as MessagePack."""
    return msgspec.msgpack.encode(value, enc_hook=_encode)


def decode(data: bytes, kind: type[T]) -> T:
    """What encode() was given, as a `kind`, bit for bit. Raises msgspec.MsgspecError for anything else."""
    return msgspec.msgpack.decode(data, type=kind, ext_hook=_decode)


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8).tobytes()
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode((value.dtype.name, value.shape, raw)))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be kept")


def _decode(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown extension {code}")
    name, shape, raw = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], bytes])
    try:
        dtype = np.dtype(name)
    except TypeError:
        import ml_dtypes  # bfloat16, float8 and 4-bit types

        dtype = np.dtype(getattr(ml_dtypes, name))
    return np.frombuffer(bytearray(raw), dtype).reshape(shape)  # of a bytearray: arrays that may be written


@cache
def _host() -> str:
    # Process numbers mean something on one machine only; the folder may be shared by several.
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]
