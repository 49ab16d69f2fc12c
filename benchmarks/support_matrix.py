"""Support matrix: every family at its tiny configuration, exported to ort-int8 and put into its own diffusers pipeline.

Random weights of the size that trained ones have. For each: how far the traced graph is from torch, SQNR of the 8-bit
network against the float one on the calls that the float pipeline makes, planned linears that run as integer kernels,
what hoisting moved, and SQNR of the latents that the pipeline ends with when the bundle is its transformer.

    python -m benchmarks.support_matrix [NAME …]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vdq_export
from benchmarks.common import main, parser, write
from tests import families, pipeline_cases, pipeline_cases_joint
from tests.pipelines import NETWORKS, Case, build, play, save, sensible, swap
from vdq_export import sources, trace
from vdq_export.bundle import Bundle
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, first_tensor
from vdq_export.report.hoisting import HOISTING, HoistingReport
from vdq_export.verify import count_kernels

RECIPE, BINS = "static-minmax", 2
MAX_ERROR, MIN_DB = 1e-4, 30.0
HEADS = ("model", "pipeline", "torch error", "W8A8 dB", "integer kernels", "hoisted weights", "in pipeline dB", "s", "")
CASES = {**pipeline_cases.CASES, **pipeline_cases_joint.CASES}
TINY = {**families.FAMILIES, **families.OTHERS}
Call = Mapping[str, Any]
Answered = tuple[Call, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Row:
    """One model. error: largest difference of graph and torch over the largest output. pipeline: "" where none was run.

    moved: share of the weight bytes that left the graph of a step. failure: what went wrong, if anything did.
    """

    name: str
    pipeline: str = ""
    error: float | None = None
    network_db: float | None = None
    planned: int = 0
    executed: int = 0
    moved: float | None = None
    pipeline_db: float | None = None
    seconds: float = 0.0
    failure: str = ""

    @property
    def good(self) -> bool:
        """All that issue and recipe ask for."""
        numbers = (self.error is not None and self.error <= MAX_ERROR) and (self.network_db or 0.0) >= MIN_DB
        return not self.failure and numbers and 0 < self.planned == self.executed


def in_pipeline(case: Case, folder: Path) -> Row:
    """Save, export and play one case. `folder` is empty."""
    began, pipe = time.monotonic(), build(case)
    model = sources.resolve(case.spec(save(pipe, case, folder / "model")))
    error, bundle = exported(model, folder / "bundle")
    with watched(pipe) as calls:
        expected = play(pipe, case)
    with vdq_export.load(bundle.path) as transformer:
        db = network_db(calls, transformer)
        swap(pipe, transformer)
        found = play(pipe, case)
    seconds = time.monotonic() - began
    return measured(case.name, case.pipeline, error, db, bundle, expected.sqnr_db(found), seconds)


def alone(name: str, folder: Path) -> Row:
    """A tiny configuration without a pipeline here: its network by itself, on random calls it is calibrated with."""
    began, model = time.monotonic(), TINY[name]()
    sensible(model.module)
    error, bundle = exported(model, folder / "bundle")
    steps = list(model.iter_trajectories())[-1]
    calls = [(step["inputs"], model(**step["inputs"]).numpy()) for step in steps]
    with vdq_export.load(bundle.path) as transformer:
        db = network_db(calls, transformer)
    return measured(name, "", error, db, bundle, None, time.monotonic() - began)


def measured(
    name: str, pipeline: str, error: float, db: float, bundle: Bundle, pipeline_db: float | None, seconds: float
) -> Row:
    kernels, _ = count_kernels(bundle)
    report = bundle.path / HOISTING
    moved = None
    if report.is_file():
        moved = HoistingReport.from_json(report.read_bytes()).networks[0].moved
    return Row(name, pipeline, error, db, kernels.planned, kernels.executed, moved, pipeline_db, seconds)


def exported(model: Model, out: Path) -> tuple[float, Bundle]:
    """(largest difference of the traced graph and torch, over the largest output, of experts the worst; the bundle)."""
    networks = dict(model.networks())
    traced = {expert: trace.trace(network) for expert, network in networks.items()}
    error = max(trace.float_error(graph, networks[expert]) for expert, graph in traced.items())
    return error, vdq_export.export(model, target="ort-int8", tsw=BINS, recipe=RECIPE, traced=traced, out=out)


@contextmanager
def watched(pipe: Any) -> Iterator[list[Answered]]:
    """Every call of the pipeline's networks and what they answer."""
    calls: list[Answered] = []

    def see(_: object, values: object, named: Call, output: Any) -> None:
        calls.append((named, first_tensor(output).numpy().copy()))

    networks = [one for name in NETWORKS if (one := getattr(pipe, name, None)) is not None]
    hooks = [one.register_forward_hook(see, with_kwargs=True) for one in networks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def network_db(calls: Sequence[Answered], transformer: Any) -> float:
    """SQNR over all calls."""
    found = [np.asarray(first_tensor(transformer(**call))).ravel() for call, _ in calls]
    return sqnr_db(np.concatenate([output.ravel() for _, output in calls]), np.concatenate(found))


def jobs() -> Iterator[tuple[str, Callable[[Path], Row]]]:
    """Every case, then every tiny configuration that no case shows, the best known families first."""
    for name, case in CASES.items():
        yield name, lambda folder, case=case: in_pipeline(case, folder)  # type: ignore[misc]
    shown = {case.tiny for case in CASES.values()}
    for name in TINY:
        if name not in shown:
            yield name, lambda folder, name=name: alone(name, folder)  # type: ignore[misc]


def safely(name: str, job: Callable[[Path], Row]) -> Row:
    """The row; of a model that fails, with what was said."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return job(Path(folder))
        except Exception as error:  # one family's fault must not hide the others' numbers
            return Row(name, failure=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def line(row: Row) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return (
        row.name, row.pipeline or "–", number(row.error, ".1e"), number(row.network_db, ".1f"),
        f"{row.executed} of {row.planned}", number(row.moved, ".0%"), number(row.pipeline_db, ".1f"),
        f"{row.seconds:.0f}", row.failure or ("" if row.good else "below what is asked"),
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    wanted = [(name, job) for name, job in jobs() if not arguments.names or name in arguments.names]
    rows = []
    for name, job in wanted[:2] if arguments.small else wanted:
        rows.append(safely(name, job))
        print(*line(rows[-1]), sep=" | ", flush=True)
    good = sum(row.good for row in rows)
    notes = (
        f"{good} of {len(rows)} fulfil: graph equal to torch within {MAX_ERROR:g}, W8A8 SQNR of at least {MIN_DB:g} "
        f"dB, every planned linear in an integer kernel. Recipe {RECIPE}, {BINS} bins, hoisting on. "
        "torch error: largest difference over the largest output, on one call. W8A8 dB: over the calls of one video "
        "(of a row without a pipeline, of random calls). In pipeline: the latents that the VAE is given, after all "
        "steps, with guidance. Two experts: the worse error, both in all other numbers; hoisted weights of the first."
    )
    small = arguments.small or bool(arguments.names)
    table = ("", HEADS, [line(row) for row in rows])
    write("support-matrix", "Families at tiny configuration", [table], {"rows": [asdict(r) for r in rows]}, notes,
          small=small, module="support_matrix")  # fmt: skip


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("names", nargs="*", help="rows to measure; results go to build/ then")
    main(made, run, {})
