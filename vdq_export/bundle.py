"""Opens a bundle: nothing in it is trusted before its schema, its files and its references were checked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from vdq_export import interfaces
from vdq_export.errors import BundleError
from vdq_export.interfaces import Interface
from vdq_export.manifest import MANIFEST, PAGE, REPORT, SCHEDULE, FileEntry, Manifest, safe_path
from vdq_export.plan import Bin, QuantPlan
from vdq_export.report.data import VerifyReport
from vdq_export.schedule import Schedule

ADDED = ("report/", "contexts/")  # what may be added to a finished bundle
_PLAN = re.compile(r"plan\.json|plans/plan\d{2,}\.json")


@dataclass(frozen=True)
class Bundle:
    """A checked bundle folder. Make one with Bundle.open(). plans: one for each set of weights and precision."""

    path: Path
    manifest: Manifest
    schedule: Schedule
    plans: tuple[QuantPlan, ...]

    def __repr__(self) -> str:
        what = f"{self.manifest.model.name} for {self.manifest.target}, {len(self.schedule.bins)} bins"
        return f"<Bundle {self.path}: {what}, {self.size / 1e6:.1f} MB>"

    @staticmethod
    def open(path: str | Path, *, verify_hashes: bool = True) -> Bundle:
        """Check and open the bundle at `path`; verify_hashes=False trusts contents and checks sizes only.

        Raises BundleError naming the file that is missing, truncated, altered, or that points outside the bundle.
        """
        root = Path(path)
        manifest_file = root / MANIFEST
        if not manifest_file.is_file():
            raise BundleError(f"{root} is not a bundle: no {MANIFEST}", hint="a bundle is the folder vdq-export writes")
        if manifest_file.is_symlink():
            raise BundleError(f"{manifest_file} is a link", hint="a bundle holds plain files only")
        try:
            manifest = Manifest.from_json(manifest_file.read_bytes(), str(manifest_file))
            for entry in manifest.files:
                _check_file(root, entry, verify_hashes)
            schedule = Schedule.from_json(_read(root, manifest, SCHEDULE), str(root / SCHEDULE))
            files = sorted(e.path for e in manifest.files if _PLAN.fullmatch(e.path))
            plans = tuple(QuantPlan.from_json(_read(root, manifest, file), str(root / file)) for file in files)
        except OSError as error:
            raise BundleError(f"cannot read {error.filename or root}: {error.strerror or error}") from error
        bundle = Bundle(root, manifest, schedule, plans)
        for graph in schedule.graphs:
            if manifest.file(graph) is None:
                raise BundleError(f"{root / SCHEDULE}: graph {graph!r} is not in the bundle")
        onnx_files = [entry.path for entry in manifest.files if entry.path.endswith(".onnx")]
        found = {path: _check_references(root, manifest, path) for path in onnx_files}
        interfaces.check(root, manifest, schedule, found)
        return bundle

    @property
    def plan(self) -> QuantPlan:
        """The plan of a bundle that has one. Raises BundleError for one with none or several."""
        if len(self.plans) != 1:
            raise BundleError(f"{self.path} carries {len(self.plans)} plans, not one", hint="see Bundle.plans")
        return self.plans[0]

    @cached_property
    def report(self) -> VerifyReport | None:
        """What `verify` found when the bundle was made, if it was run."""
        if self.manifest.file(REPORT) is None:
            return None
        return VerifyReport.from_json(_read(self.path, self.manifest, REPORT), str(self.path / REPORT))

    @property
    def size(self) -> int:
        """Bytes of all files listed in the manifest but the report page, which is for people and can be made again."""
        return sum(entry.size for entry in self.manifest.files if entry.path != PAGE)

    def graph_path(self, bin: int | Bin) -> Path:
        """The .onnx file of a bin (its index or itself)."""
        return self.path / self.schedule.bins[bin if isinstance(bin, int) else bin.index].graph

    def attach(self, path: str, data: bytes) -> Bundle:
        """Add or replace a file below report/; returns the bundle with it. Never leaves the bundle invalid."""
        return self.attach_files({path: data})

    def attach_files(self, files: Mapping[str, bytes | Path], *, clear: Sequence[str] = ()) -> Bundle:
        """Add or replace files below report/ and contexts/, all of them or none; returns the bundle with them.

        files: contents, or a file on the bundle's file system that is moved in. clear: folders ("contexts/v75/") that
        hold nothing else afterwards. Raises BundleError when the bundle was changed since it was opened.
        """
        for path in [*files, *clear]:
            if not safe_path(path.rstrip("/"), str(self.path)).startswith(ADDED):
                raise BundleError(f"{path} cannot be changed", hint=f"only {' and '.join(ADDED)} may be added to")
            refuse_links(self.path, self.path / path)  # before anything is written or removed through one
        current = self._unchanged()
        gone = [e.path for e in current.files if e.path.startswith(tuple(clear)) and e.path not in files]
        kept = tuple(e for e in current.files if e.path not in files and e.path not in gone)
        entries: list[FileEntry] = []
        try:
            # The entries go first and come back last: killed in between, the bundle merely has no such files.
            if len(kept) != len(current.files):
                self._replace(MANIFEST, msgspec.structs.replace(current, files=kept).to_json())
            for path in gone:
                (self.path / path).unlink(missing_ok=True)
            for path, source in files.items():
                entries.append(self._put(path, source))
            listed = tuple(sorted((*kept, *entries), key=lambda one: one.path))
            manifest = msgspec.structs.replace(current, files=listed)
            self._replace(MANIFEST, manifest.to_json())
        except OSError as error:
            for entry in entries:
                (self.path / entry.path).unlink(missing_ok=True)
            raise BundleError(f"cannot write {error.filename or self.path}: {error.strerror or error}") from error
        return Bundle(self.path, manifest, self.schedule, self.plans)

    def _unchanged(self) -> Manifest:
        """The manifest on disk now: others may have added files, but it is still this bundle."""
        origin = self.path / MANIFEST
        try:
            current = Manifest.from_json(origin.read_bytes(), str(origin))
        except OSError as error:
            raise BundleError(f"cannot read {origin}: {error.strerror or error}") from error
        own = [[e for e in one.files if not e.path.startswith(ADDED)] for one in (self.manifest, current)]
        if own[0] != own[1]:
            raise BundleError(f"{self.path} was replaced meanwhile", hint="start again")
        return current

    def _put(self, path: str, source: bytes | Path) -> FileEntry:
        """Bring one file into its place; the manifest is the caller's."""
        if isinstance(source, bytes):
            self._replace(path, source)
            return FileEntry(path=path, size=len(source), sha256=hashlib.sha256(source).hexdigest())
        entry = FileEntry(path=path, size=source.stat().st_size, sha256=hash_file(source))
        with source.open("rb+") as file:  # Windows flushes what may be written only
            os.fsync(file.fileno())
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        source.replace(self.path / path)
        return entry

    def _replace(self, path: str, data: bytes) -> None:
        place = self.path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(place)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def is_bundle(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours, of this format version or another; its files are not looked at."""
    try:
        head = msgspec.json.decode((folder / MANIFEST).read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError):
        return False
    return isinstance(head, dict) and head.get("kind") == "vdq-export bundle"


def hash_file(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(root: Path, entry: FileEntry, verify_hashes: bool) -> None:
    place = root / entry.path
    refuse_links(root, place)
    if not place.is_file():
        raise BundleError(f"{place} is missing", hint="copy the whole folder, or export again")
    size = place.stat().st_size
    if size != entry.size:
        raise BundleError(f"{place} has {size} bytes instead of {entry.size}", hint="it is truncated or was changed")
    if verify_hashes and hash_file(place) != entry.sha256:
        raise BundleError(f"{place} was changed: its sha256 is not the manifest's", hint="copy or export it again")


def refuse_links(root: Path, place: Path) -> None:
    """Raise BundleError when `place`, or a folder between it and `root`, is a symbolic link."""
    for part in [place, *place.parents]:
        if part == root:
            break
        if part.is_symlink():
            raise BundleError(f"{part} is a link", hint="a bundle holds plain files only")


def _read(root: Path, manifest: Manifest, path: str) -> bytes:
    if manifest.file(path) is None:
        raise BundleError(f"{root / MANIFEST} lists no {path}")
    return (root / path).read_bytes()


def _check_references(root: Path, manifest: Manifest, graph: str) -> Interface:
    """Every file a graph refers to (external data, compiled contexts) is inside its folder and in the manifest.

    Returns what the graph takes and gives.
    """
    origin = str(root / graph)
    model = onnx.ModelProto()
    try:
        model.ParseFromString((root / graph).read_bytes())
    except DecodeError as error:
        raise BundleError(f"{origin} is not an ONNX model") from error
    for tensor in _tensors(model.graph, model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {item.key: item.value for item in tensor.external_data}
        # Checked before it is joined: no ".." can take it out of the graph's own folder.
        location = safe_path(fields.get("location", ""), f"{origin}, initializer {tensor.name}")
        entry = manifest.file(f"{graph.rpartition('/')[0]}/{location}".lstrip("/"))
        if entry is None:
            raise BundleError(f"{origin}, initializer {tensor.name}: {location} is not a file of the bundle")
        offset, length = fields.get("offset", "0"), fields.get("length", "0")
        if not (offset.isdecimal() and length.isdecimal() and int(offset) + int(length) <= entry.size):
            raise BundleError(f"{origin}, initializer {tensor.name}: points outside {location}")
    for node in model.graph.node:
        if node.op_type != "EPContext":
            continue
        compiled = {one.name: one for one in node.attribute}
        if "embed_mode" in compiled and compiled["embed_mode"].i == 0:
            file = compiled["ep_cache_context"].s.decode("utf-8", "replace") if "ep_cache_context" in compiled else ""
            binary = safe_path(file, f"{origin}, node {node.name}")
            if manifest.file(f"{graph.rpartition('/')[0]}/{binary}".lstrip("/")) is None:
                raise BundleError(f"{origin}, node {node.name}: {binary} is not a file of the bundle")
    return interfaces.interface(model)


def _tensors(graph: onnx.GraphProto, model: onnx.ModelProto | None = None) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    nodes = list(graph.node)
    for function in model.functions if model else ():
        nodes.extend(function.node)
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
