"""Writes a bundle whole or not at all.

Everything goes into a sibling folder "<out>.partial-<host>-<pid>-<random>", which is flushed to disk and renamed at the
end. An exception removes it; a killed process leaves it, and the next export to the same place clears it away.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import msgspec
import onnx
import psutil

from vdq_export.bundle import Bundle, hash_file, is_bundle
from vdq_export.disk import sync_folder
from vdq_export.errors import BundleError
from vdq_export.manifest import (
    MANIFEST,
    REPORT,
    SCHEDULE,
    FileEntry,
    Manifest,
    Signature,
    TensorInfo,
    plan_path,
    safe_path,
    tool_versions,
)
from vdq_export.plan import QuantPlan
from vdq_export.report.data import VerifyReport
from vdq_export.schedule import Schedule
from vdq_export.weights.store import Array, WeightStore

GRAPHS = "graphs"
# Below graphs/, not beside it: onnxruntime and onnx.checker refuse external data outside the folder of the .onnx file.
WEIGHTS = "weights/weights.bin"


class BundleWriter:
    """Context manager; call commit() inside it. Leaving it without commit() leaves no bundle.

    force: replace what is at `out`, provided it is a bundle or an empty folder; nothing else is ever deleted.
    Raises BundleError when `out` is taken, is a link or a file, or cannot be written (disk full included).
    """

    def __init__(self, out: str | Path, *, force: bool = False) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100  (resolve() would follow a link that must be refused)
        self._force = force
        self._committed = False
        self._closed = True
        self._hashed: dict[str, FileEntry] = {}

    def __enter__(self) -> BundleWriter:
        with _one_line(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(self.out)
            self._check_free()
            self._folder = _sibling(self.out, "partial")
            self._folder.mkdir()
        self._closed = False
        self._store = WeightStore(self._folder / GRAPHS / WEIGHTS, WEIGHTS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        if not self._committed:
            with suppress(OSError):  # closing flushes, and the disk may be full
                self._store.abandon()
            shutil.rmtree(self._folder, ignore_errors=True)
            if error is None:
                raise BundleError(f"{self.out} was not written", hint="call commit() inside the with block")

    def add_graph(self, name: str, model: onnx.ModelProto, arrays: Mapping[str, Array] | None = None) -> str:
        """Write graphs/<name>.onnx and return that path. `arrays`: data of initializers left out of `model`; promises
        among them are settled, so that the graph they come from reads them from the bundle.

        `model` is edited: its large initializers become references into the shared weight store.
        """
        path = f"{GRAPHS}/{name}.onnx"
        with _one_line(self.out):
            self._store.externalise(model, arrays or {})
            self._store.flush()  # targets read their graphs back before the bundle is done
        self.add_file(path, model.SerializeToString(deterministic=True))
        return path

    def add_file(self, path: str, data: bytes) -> None:
        """Write one more file, for example handoff/encodings.bin00.json."""
        with _one_line(self.out), self.file(path).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._hashed[path] = FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def file(self, path: str) -> Path:
        """Where a writer of its own (safetensors …) may put the bundle's file `path`; its folder exists."""
        if self._closed:
            raise BundleError(f"{self.out} is not open for writing", hint="use the writer as a context manager")
        place = self._folder / safe_path(path, "bundle")
        with _one_line(self.out):
            place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def commit(
        self,
        manifest: Manifest,
        schedule: Schedule,
        plans: Sequence[QuantPlan] = (),
        report: VerifyReport | None = None,
        describe: Callable[[Bundle], Mapping[str, bytes]] | None = None,
    ) -> Bundle:
        """Write schedule, plans, report and manifest, check the whole, and put it in place.

        manifest: everything but `files` and `tools`, which are filled in here. describe: what is to be added below
        report/ about the bundle as it was checked. Returns the opened bundle.
        """
        self.add_file(SCHEDULE, schedule.to_json())
        for number, plan in enumerate(plans):
            self.add_file(plan_path(number, len(plans)), plan.to_json())
        if report is not None:
            self.add_file(REPORT, report.to_json())
        with _one_line(self.out):
            size, digest = self._store.close()
            if self._store.path is not None:
                path = f"{GRAPHS}/{WEIGHTS}"
                self._hashed[path] = FileEntry(path=path, size=size, sha256=digest)
            entries = tuple(self._entry(path) for path in sorted(p for p in self._folder.rglob("*") if p.is_file()))
            full = msgspec.structs.replace(manifest, files=entries, tools=tool_versions())
            self.add_file(MANIFEST, full.to_json())
            # Reads back every schema and reference. The hashes were taken on the way to the disk.
            checked = Bundle.open(self._folder, verify_hashes=False)
            if describe is not None:
                checked.attach_files(describe(checked))
            for folder in [*(p for p in self._folder.rglob("*") if p.is_dir()), self._folder]:
                sync_folder(folder)
            self._put_in_place()
        return Bundle.open(self.out, verify_hashes=False)

    def _entry(self, place: Path) -> FileEntry:
        path = place.relative_to(self._folder).as_posix()
        if path not in self._hashed:
            place.chmod(stat.S_IMODE((self._folder / SCHEDULE).stat().st_mode))  # safetensors' are their owner's alone
            with place.open("rb+") as file:
                os.fsync(file.fileno())
            self._hashed[path] = FileEntry(path=path, size=place.stat().st_size, sha256=hash_file(place))
        return self._hashed[path]

    def _check_free(self) -> None:
        if not os.path.lexists(self.out):
            return
        if self.out.is_symlink() or not self.out.is_dir():
            raise BundleError(f"{self.out} exists and is not a folder", hint="choose another output folder")
        if not any(self.out.iterdir()):
            return
        if not is_bundle(self.out):
            raise BundleError(f"{self.out} is not a bundle and is never replaced", hint="choose another output folder")
        if not self._force:
            raise BundleError(f"{self.out} exists", hint="choose another output folder, or --force to replace a bundle")

    def _put_in_place(self) -> None:
        self._check_free()  # again: hours may have passed
        aside = None
        if self.out.exists():
            aside = _sibling(self.out, "replaced")
            self.out.rename(aside)
        try:
            self._folder.rename(self.out)
            self._committed = True
        except BaseException:
            if aside is not None and not self.out.exists():
                aside.rename(self.out)
            raise
        sync_folder(self.out.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def scratch(bundle: Path) -> Iterator[Path]:
    """An empty folder beside `bundle`, so that files can be moved from it into the bundle; removed in the end.

    One that a killed process left goes when the next one is made, or the next bundle written there.
    """
    out = Path(os.path.abspath(bundle))  # noqa: PTH100
    with _one_line(out):
        _clear_leftovers(out)
        folder = _sibling(out, "partial")
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def signature_of(
    model: onnx.ModelProto, timestep: str, *, bare: bool = False, arguments: Sequence[str] = ()
) -> Signature:
    """Names, types and shapes of a graph's inputs and outputs. Raises BundleError for a dynamic shape.

    bare: what was traced answers with a tensor, and not with something that holds one. arguments: its own, in order.
    """
    initialized = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_info(value) for value in model.graph.input if value.name not in initialized)
    if timestep not in {one.name for one in inputs}:
        raise BundleError(f"the graph has no timestep input {timestep!r}")
    outputs = tuple(_info(value) for value in model.graph.output)
    return Signature(
        inputs=inputs,
        outputs=outputs,
        timestep=timestep,
        returns="tensor" if bare else "output",
        positional=_positional([one.name for one in inputs], arguments),
    )


def _positional(inputs: Sequence[str], arguments: Sequence[str]) -> tuple[str, ...]:
    """`arguments` up to the last that is an input, then the inputs that are none; () where that is `inputs`."""
    last = max((at for at, name in enumerate(arguments, 1) if name in inputs), default=0)
    order = (*arguments[:last], *(name for name in inputs if name not in arguments))
    return () if order == tuple(inputs) else order


def _info(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        raise BundleError(f"the shape of {value.name!r} is not static")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return TensorInfo(name=value.name, dtype=str(dtype), shape=tuple(dim.dim_value for dim in kind.shape.dim))


def _sibling(out: Path, purpose: str) -> Path:
    return out.with_name(f"{out.name}.{purpose}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _host() -> str:
    # Process numbers mean something on one machine only; the folder may be shared by several.
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _clear_leftovers(out: Path) -> None:
    """Remove what dead processes left beside `out`; put back a bundle that one had moved aside and not yet replaced."""
    pattern = re.compile(rf"{re.escape(out.name)}\.(partial|replaced)-{_host()}-(\d+)-[0-9a-f]{{8}}")
    for place in sorted(out.parent.iterdir()):
        found = pattern.fullmatch(place.name)
        if not found or psutil.pid_exists(int(found[2])) or place.is_symlink() or not place.is_dir():
            continue
        if found[1] == "replaced" and not os.path.lexists(out):
            place.rename(out)
        else:
            shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BundleError(f"cannot write {out}: {error.strerror or error}", hint="nothing was left behind") from error
