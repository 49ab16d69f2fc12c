"""From the bins' verified graphs to what the GPU runs: merged by structure, fused, kernels compiled ahead."""

from __future__ import annotations

from collections.abc import Mapping

from vdq_export.bundle_writer import BundleWriter
from vdq_export.graph import Graph
from vdq_export.runtime import families
from vdq_export.target_spec import TargetSpec
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda.merge import merge
from vdq_export.targets.cuda.programs import PROGRAMS, Fused, Program, Programs


def write(writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec) -> None:
    """graphs: {bundle path: graph}, bin by bin; the files are there already."""
    paths = list(graphs)
    programs = []
    for number, family in enumerate(families.find([writer.file(path) for path in paths])):
        merged = merge(graphs[paths[family.bins[0]]], [family.constants[index] for index in family.bins])
        fused = tuple(
            Fused(
                name=one.name,
                applied=one.applied,
                skipped=tuple(f"{skip.where}: {skip.why}" for skip in one.skipped),
            )
            for one in fuse.run(merged)
        )
        path = writer.add_graph(f"cuda.{number:02d}", *merged.skeleton())
        programs.append(Program(graph=path, bins=family.bins, fused=fused))
    writer.add_file(PROGRAMS, Programs(programs=tuple(programs)).to_json())
