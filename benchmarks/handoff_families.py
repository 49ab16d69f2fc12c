"""Family matrix on Hexagon: tiny models of the video DiTs in diffusers, exported for qnn, compiled and emulated.

For each: nodes that the compiler leaves to the CPU, contexts it makes, and SQNR against the float model of the emulated
graph and of the same graph on onnxruntime's CPU, nothing fused. What is lost between the two is the compiler's doing.
Prints a Markdown table:  python -m benchmarks.handoff_families [FAMILY …]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

import vdq_export
from tests.families import FAMILIES
from vdq_export import ort
from vdq_export.errors import VdqError
from vdq_export.graph import Graph
from vdq_export.lint import lint_graphs
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.runtime.ahead import Ahead

HEADS = ("family", "operators", "CPU nodes", "contexts", "lint errors", "compile s", "emulated dB", "ORT dB", "remark")
STEPS = (0, 5)  # of the first trajectory: noisy and conditional, cleaner and unconditional


@dataclass(frozen=True)
class Measured:
    """Of one family's only bin. cpu_nodes: "OpType name" of what the HTP does not take. lint_errors: rules."""

    operators: int
    cpu_nodes: tuple[str, ...]
    contexts: int
    lint_errors: tuple[str, ...]
    compile_seconds: float
    emulated_db: float
    ort_db: float


def measure(model: Model, folder: Path, arch: str = "v75") -> Measured:
    """Export `model` for qnn with one bin into `folder`, compile, and run STEPS on emulator and CPU.

    Raises CompileError where the compiler fails altogether.
    """
    from vdq_export.targets.qnn import hexagon  # needs onnxruntime-qnn

    bundle = vdq_export.export(model, target="qnn", tsw=1, out=folder)
    path = bundle.graph_path(0)
    graph = Graph.load(path)
    steps = [next(iter(model.iter_trajectories()))[index]["inputs"] for index in STEPS]
    expected = np.stack([model(**step).numpy() for step in steps])
    cpu = ort.session(graph, exact=True)
    with closing(Ahead(bundle)) as ahead:
        feeds = [ahead.arrays(0, cpu, {name: one.numpy() for name, one in step.items()}) for step in steps]
    begun = time.perf_counter()
    htp = hexagon.emulator(path, arch, strict=False)
    compiled = time.perf_counter() - begun
    return Measured(
        operators=sum(node.op not in ("QuantizeLinear", "DequantizeLinear") for node in graph.nodes),
        cpu_nodes=tuple(hexagon.left_over(htp)),
        contexts=sum(part.ep_name == hexagon.PROVIDER for part in htp.get_provider_graph_assignment_info()),
        lint_errors=tuple(finding.rule for finding in lint_graphs({path.name: graph}, f"qnn-{arch}").errors),
        compile_seconds=compiled,
        emulated_db=sqnr_db(expected, np.stack([htp.run(None, one)[0] for one in feeds])),
        ort_db=sqnr_db(expected, np.stack([cpu.run(None, one)[0] for one in feeds])),
    )


def rows(families: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """HEADS of each family (all of them unless named), as text, as soon as it is measured."""
    return (_row(name) for name in families or FAMILIES)


def _row(name: str) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(FAMILIES[name](), Path(folder) / "bundle")
        except VdqError as error:
            return (name, *("–",) * (len(HEADS) - 2), str(error))
    return (
        name, str(found.operators), str(len(found.cpu_nodes)), str(found.contexts),
        str(len(found.lint_errors)), f"{found.compile_seconds:.1f}", f"{found.emulated_db:.2f}", f"{found.ort_db:.2f}",
        ", ".join((*found.cpu_nodes, *found.lint_errors)[:3]),
    )  # fmt: skip


if __name__ == "__main__":
    for row in chain((HEADS, ["---"] * len(HEADS)), rows(tuple(sys.argv[1:]))):
        print(f"| {' | '.join(row)} |", flush=True)
