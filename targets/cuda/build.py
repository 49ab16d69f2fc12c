"""From the bins' verified graphs to what the GPU runs: merged by structure, fused, kernels compiled ahead."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from vdq_export.bundle_writer import BundleWriter
from vdq_export.contract import PassReport
from vdq_export.devices import vendor_tool
from vdq_export.graph import Graph
from vdq_export.progress import Reporter
from vdq_export.runtime import families
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda.merge import merge
from vdq_export.targets.cuda.programs import PROGRAMS, Fused, Program, Programs


def write(writer: BundleWriter, graphs: Mapping[str, Graph], archs: Sequence[str], reporter: Reporter) -> None:
    """graphs: {bundle path: graph}, bin by bin; the files are there already. archs: to compile kernels for.

    Raises MissingToolError without Triton where there are any.
    """
    paths = list(graphs)
    programs = []
    for number, family in enumerate(families.find([writer.file(path) for path in paths])):
        merged = merge(graphs[paths[family.bins[0]]], [family.constants[index] for index in family.bins])
        fused = tuple(map(_told, fuse.run(merged)))
        path = writer.add_graph(f"cuda.{number:02d}", *merged.skeleton())
        programs.append(Program(graph=path, bins=family.bins, fused=fused))
    kernels, triton = _compile(writer, [writer.file(one.graph) for one in programs], archs, reporter)
    told = Programs(programs=tuple(programs), kernels=kernels, triton=triton)
    writer.add_file(PROGRAMS, told.to_json())


def _told(report: PassReport) -> Fused:
    skipped = tuple(f"{one.where}: {one.why}" for one in report.skipped)
    return Fused(name=report.name, applied=report.applied, skipped=skipped)


def _compile(
    writer: BundleWriter, graphs: Sequence[Path], archs: Sequence[str], reporter: Reporter
) -> tuple[tuple[str, ...], str]:
    """Kernels of all graphs into the bundle: (architectures that have some, Triton's version).

    Which ones is seen by running the graphs without values.
    """
    if not archs:
        return (), ""
    triton = vendor_tool.module("triton", "triton", "pip install 'vdq-export[cuda]', or --isa jit")
    from vdq_export.targets.cuda import aot

    launches = sorted({one for path in graphs for one in aot.launches_of(path, archs=archs, say=reporter.note)})
    done = itertools.count(1)
    with reporter.stage("compile kernels") as advance:

        def say(text: str) -> None:
            advance(min(next(done), len(launches)), len(launches))
            reporter.note(text)

        written = set[str]()
        for path, data in aot.compile_all(launches, say=say):
            writer.add_file(path, data)
            written.add(path.removeprefix(f"{aot.FOLDER}/").split("/")[0])
    return tuple(arch for arch in archs if arch in written), str(triton.__version__)
