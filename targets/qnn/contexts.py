"""A bundle's graphs as context binaries for Hexagon NPUs, made by the offline compiler and added to the bundle.

    contexts/v75/body.bin00_ctx.onnx      what onnxruntime's QNN provider loads: inputs, EPContext nodes, outputs
    contexts/v75/body.bin00_ctx_qnn.bin   the binary; bins that share weights refer to one, named after the first

A graph that is too large for one context is cut at block boundaries; its ..._ctx.onnx then has one EPContext node a
part, chained. The compiler writes other bytes each time, so nothing here is compared by hash.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec
import onnx

from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import WEIGHTS, scratch
from vdq_export.devices import qnn_provider
from vdq_export.errors import BundleError, CompileError, OffDeviceError, UnknownNameError
from vdq_export.jsonfile import decode, encode
from vdq_export.progress import Advance, Reporter, piece
from vdq_export.targets.qnn import partition
from vdq_export.targets.qnn.offline import Done, Job, Result, Task, compile_offline

REPORT = "report/compile.json"
TARGET = "qnn"
Parts = int | Literal["auto"]


@dataclass(frozen=True)
class Soc:
    """A chip of an architecture, by Qualcomm's name, by QNN's number (QnnTypes.h), and as it is sold."""

    name: str
    model: int
    product: str


# Names, numbers and architectures: pytorch/executorch, backends/qualcomm/serialization/qc_schema.py.
SOCS = {
    "v73": Soc("SM8550", 43, "Snapdragon 8 Gen 2"),
    "v75": Soc("SM8650", 57, "Snapdragon 8 Gen 3"),
    "v79": Soc("SM8750", 69, "Snapdragon 8 Elite"),
    "v81": Soc("SM8850", 87, "Snapdragon 8 Elite Gen 5"),
}


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class GraphContexts(_Data, frozen=True):
    """One graph of the bundle, compiled. nodes: all on the HTP. spill_fill_bytes: of each part, what does not fit the
    NPU's own memory while it runs and goes to main memory. boundaries: the tensors handed from part to part.
    """

    graph: str
    model: str
    binaries: tuple[str, ...]
    nodes: int
    seconds: float
    cpu_seconds: float
    spill_fill_bytes: tuple[int, ...]
    boundaries: tuple[str, ...] = ()


class ArchContexts(_Data, frozen=True):
    """All graphs for one architecture. peak_memory_bytes: of the compiler's process."""

    arch: str
    soc: str
    soc_model: int
    shared: bool
    parts: int
    seconds: float
    binary_bytes: int
    peak_memory_bytes: int
    graphs: tuple[GraphContexts, ...]


class CompileReport(_Data, frozen=True):
    """report/compile.json."""

    contexts: tuple[ArchContexts, ...]
    tools: dict[str, str]
    format: Literal[1] = 1

    def to_json(self) -> bytes:
        return encode(self, REPORT)


def compile_bundle(
    bundle: Bundle,
    archs: Sequence[str],
    *,
    shared: bool = True,
    parts: Parts = 1,
    force: bool = False,
    reporter: Reporter | None = None,
) -> tuple[Bundle, CompileReport]:
    """Compile the graph of every bin for each of `archs` and add the result to the bundle: all of it or nothing.

    shared: bins of one network go into one binary, their weights once. parts: into how many contexts to cut each
    graph; "auto": as few as compile. force: replace earlier contexts of these architectures.
    Raises UnknownNameError, MissingToolError, BundleError, and CompileError for what the compiler refuses.
    """
    reporter = reporter or Reporter()
    _check(bundle, archs, force)
    with scratch(bundle.path) as folder:
        made = []
        for arch in dict.fromkeys(archs):
            with reporter.stage(f"compile for {arch}") as advance:
                made.append(_Compiler(bundle, arch, shared, parts, folder, reporter, advance).run())
        report = _merged(bundle, made)
        files: dict[str, bytes | Path] = {
            f"contexts/{path.relative_to(folder / 'contexts').as_posix()}": path
            for path in sorted((folder / "contexts").rglob("*"))
            if path.is_file()
        }
        files[REPORT] = report.to_json()
        return bundle.attach_files(files, clear=[f"contexts/{one.arch}/" for one in made]), report


def _check(bundle: Bundle, archs: Sequence[str], force: bool) -> None:
    for arch in archs:
        if arch not in SOCS:
            raise UnknownNameError("HTP architecture", arch, SOCS)
        if not force and any(e.path.startswith(f"contexts/{arch}/") for e in bundle.manifest.files):
            raise BundleError(f"{bundle.path} has contexts for {arch} already", hint="--force replaces them")
    if bundle.manifest.target != TARGET:
        raise BundleError(
            f"{bundle.path} was made for {bundle.manifest.target}, not for {TARGET}", hint=f"export --target {TARGET}"
        )
    qnn_provider.htp_library()  # raises MissingToolError


def _merged(bundle: Bundle, made: Sequence[ArchContexts]) -> CompileReport:
    """The report of `made`, and of what was compiled before for other architectures."""
    known = {}
    if bundle.manifest.file(REPORT) is not None:
        old = decode((bundle.path / REPORT).read_bytes(), CompileReport, REPORT, BundleError)
        known = {one.arch: one for one in old.contexts}
    known |= {one.arch: one for one in made}
    tools = {name: metadata.version(name) for name in ("onnxruntime", "onnxruntime-qnn")}
    return CompileReport(contexts=tuple(known[arch] for arch in sorted(known)), tools=tools)


class _Compiler:
    """The graphs of one bundle, for one architecture."""

    def __init__(
        self, bundle: Bundle, arch: str, shared: bool, parts: Parts, folder: Path, reporter: Reporter, advance: Advance
    ) -> None:
        self.bundle, self.arch, self.shared, self.parts = bundle, arch, shared, parts
        self.folder, self.reporter, self.advance = folder, reporter, advance
        self.out = folder / "contexts" / arch
        self.peak = 0

    def run(self) -> ArchContexts:
        start = time.perf_counter()
        self.out.mkdir(parents=True)
        parts, graphs = self._fewest()
        soc = SOCS[self.arch]
        return ArchContexts(
            arch=self.arch,
            soc=soc.name,
            soc_model=soc.model,
            shared=self.shared,
            parts=parts,
            seconds=time.perf_counter() - start,
            binary_bytes=sum(path.stat().st_size for path in self.out.glob("*.bin")),
            peak_memory_bytes=self.peak,
            graphs=tuple(sorted(graphs, key=lambda one: one.graph)),
        )

    def _fewest(self) -> tuple[int, list[GraphContexts]]:
        """(parts, graphs), with as few parts as compile; one number of parts for all graphs, so that bins can share."""
        if self.parts != "auto":
            return self.parts, self._all(self.parts)
        most = 1 + min(len(partition.boundaries(_skeleton(self.bundle.path / one))) for one in self._graphs())
        count = 1
        while True:
            try:
                return count, self._all(count)
            except CompileError as error:
                if count >= most or isinstance(error, OffDeviceError):
                    raise
                self.reporter.note(f"{self.arch} in {count} parts: {error}")
                count += 1

    def _graphs(self) -> list[str]:
        """Bundle paths of the bins' graphs. A probe for step reuse is a small float graph: the host runs it."""
        return list(dict.fromkeys(one.graph for one in self.bundle.schedule.bins))

    def _groups(self) -> list[list[str]]:
        """Graphs compiled together: the bins of one network, when weights are shared; else each by itself."""
        if not self.shared:
            return [[graph] for graph in self._graphs()]
        groups: dict[str, list[str]] = {}
        for one in self.bundle.schedule.bins:
            if one.graph not in groups.setdefault(one.when.expert, []):
                groups[one.when.expert].append(one.graph)
        return list(groups.values())

    def _all(self, parts: int) -> list[GraphContexts]:
        for left in self.out.iterdir():  # of an attempt with fewer parts
            left.unlink()
        groups = self._groups()
        rows = enumerate(groups)
        return [
            x for number, group in rows for x in self._group(group, parts, piece(self.advance, number, len(groups)))
        ]

    def _group(self, graphs: Sequence[str], parts: int, advance: Advance) -> list[GraphContexts]:
        """Compile graphs that may share weights: part by part, each part of all graphs in one process."""
        cut = [self._sources(graph, parts) for graph in graphs]
        contexts = [[self.out / f"{source.stem}_ctx.onnx" for source in sources] for sources in cut]
        results = []
        for number in range(parts):
            pairs = zip(cut, contexts, strict=True)
            tasks = tuple(Task(source=str(s[number]), context=str(c[number])) for s, c in pairs)
            job = Job(
                arch=self.arch, soc_model=SOCS[self.arch].model, tasks=tasks, shared=self.shared and len(tasks) > 1
            )
            results.append(self._compile(job, graphs))
            advance(number + 1, parts)
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        return [
            self._collect(graph, made, [result.tasks[number] for result in results])
            for number, (graph, made) in enumerate(zip(graphs, contexts, strict=True))
        ]

    def _compile(self, job: Job, graphs: Sequence[str]) -> Result:
        try:
            result = compile_offline(job, self.folder)
        except CompileError as error:
            raise type(error)(f"{', '.join(graphs)} for {self.arch}: {error.what}", hint=error.hint) from error
        self.peak = max(self.peak, result.peak_memory_bytes)
        return result

    def _sources(self, graph: str, parts: int) -> list[Path]:
        """The graph itself, or its parts in a folder where they find its weights."""
        source = self.bundle.path / graph
        if parts == 1:
            return [source]
        folder = self.folder / "parts"
        _link(self.bundle.path / "graphs" / WEIGHTS, folder / WEIGHTS)
        made = []
        for number, part in enumerate(partition.split(_skeleton(source), parts)):
            made.append(folder / f"{source.stem}.part{number:02d}.onnx")
            made[-1].write_bytes(part.SerializeToString(deterministic=True))
        return made

    def _collect(self, graph: str, models: Sequence[Path], done: Sequence[Done]) -> GraphContexts:
        """Describe one graph's contexts; those of several parts become one chain in one model."""
        parts = [onnx.load(path, load_external_data=False) for path in models]
        attributes = [{a.name: a for a in node.attribute} for part in parts for node in part.graph.node]
        if len(attributes) != len(models):
            raise CompileError(f"{graph} for {self.arch} became {len(attributes)} contexts instead of {len(models)}")
        place = self.out / f"{PurePosixPath(graph).stem}_ctx.onnx"
        inner: list[str] = []
        if len(parts) > 1:
            whole, inner = partition.chain(parts, _skeleton(self.bundle.path / graph))
            for path in models:
                path.unlink()
            place.write_bytes(whole.SerializeToString(deterministic=True))
        return GraphContexts(
            graph=graph,
            model=f"contexts/{self.arch}/{place.name}",
            binaries=tuple(f"contexts/{self.arch}/{one['ep_cache_context'].s.decode()}" for one in attributes),
            nodes=sum(one.nodes for one in done),
            seconds=sum(one.seconds for one in done),
            cpu_seconds=sum(one.cpu_seconds for one in done),
            spill_fill_bytes=tuple(one["max_size"].i if "max_size" in one else 0 for one in attributes),
            boundaries=tuple(inner),
        )


def _skeleton(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _link(source: Path, place: Path) -> None:
    """`source` under another name: onnxruntime refuses external data that is reached through a symbolic link."""
    if not source.exists() or place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, place)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, place)
