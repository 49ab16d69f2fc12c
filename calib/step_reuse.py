"""How the change of a step's modulated input tells the change of its output: the polynomial behind step reuse.

Formulas are in docs/schedule.md. Everything is measured on the float graph over the calibration trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice, pairwise
from typing import NamedTuple

import numpy as np

from vdq_export import ort
from vdq_export.calib.observe import step_feeds
from vdq_export.calib.record import Slot
from vdq_export.calib.trajectories import Runs
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph
from vdq_export.graphs import probe
from vdq_export.metrics import relative_change
from vdq_export.model import Model, Trajectory
from vdq_export.work import store as work_store
from vdq_export.work import units
from vdq_export.work.store import WorkStore

TRAJECTORIES = 4  # a fit of five coefficients to 4 × (steps − 1) points


class Changes(NamedTuple):
    """Relative L1 changes from each step of a trajectory to the next: of the modulated input, and of the output."""

    inputs: tuple[float, ...]
    outputs: tuple[float, ...]


class Learnt(NamedTuple):
    """The probe graph of one network, and what its changes say about the output's: policy.Probe's coefficients."""

    graph: Graph
    coefficients: tuple[float, ...]


def learn(
    graph: Graph,
    model: Model,
    *,
    limit: int = TRAJECTORIES,
    threads: int | None = None,
    store: WorkStore | None = None,
) -> Learnt:
    """Cut the probe out of the canonical float `graph` and fit its polynomial over `model`'s trajectories.

    The latent is the first input that is not the timestep. store: asked for the coefficients first. Raises PassError
    for a network without a modulated input, CalibrationError as changes() and fit() do.
    """
    latent = next(name for name in model.example_inputs if name != model.timestep_input)
    value = probe.choose(graph, model.timestep_input, latent)

    def compute() -> tuple[float, ...]:
        return fit(*changes(graph, model, value, limit=limit, threads=threads))

    runs = Runs(model)
    if store is None or runs.keys is None:  # to know that they are the same they would have to be made again
        return Learnt(probe.cut(graph, value), compute())
    start = work_store.key("step reuse", graph.hash(), value, threads)
    unit = runs.chain(start, min(limit, len(runs.keys)))
    assert unit is not None
    return Learnt(probe.cut(graph, value), units.once(store, unit, compute, tuple[float, ...]))


def changes(
    graph: Graph, model: Model, value: str, *, limit: int = TRAJECTORIES, threads: int | None = None
) -> Changes:
    """Measure them with the canonical float `graph` over `model`'s first `limit` trajectories.

    value: what probe.choose() named. A step is its first call, as for the runtime. Raises CalibrationError when no
    trajectory has two steps, or for inputs that do not fit the graph.
    """
    session = ort.session(graph, outputs=[value], threads=threads)
    names = [value, str(graph.gs.outputs[0].name)]
    types = {one.name: one.type for one in session.get_inputs()}
    found = []
    for trajectory in islice(model.iter_trajectories(), limit):
        runs = [session.run(names, feeds) for feeds in _first_calls(trajectory, types)]
        found += [_change(before, now) for before, now in pairwise(runs)]
    if not found:
        raise CalibrationError(f"no trajectory of {model.name} has two steps", hint="step reuse compares steps")
    return Changes(tuple(one for one, _ in found), tuple(two for _, two in found))


def fit(changes_in: Sequence[float], changes_out: Sequence[float], degree: int = 4) -> tuple[float, ...]:
    """Coefficients, highest power first, of the polynomial with the least squared error out ≈ p(in).

    Fewer distinct points than coefficients lower the degree. Raises CalibrationError when no pair is finite.
    """
    pairs = np.array([changes_in, changes_out], np.float64)
    x, y = pairs[:, np.isfinite(pairs).all(axis=0)]
    if not len(x):
        raise CalibrationError("no step's change is finite, so none can be estimated", hint="check the trajectories")
    degree = min(degree, len(np.unique(x)) - 1)
    # Powers of changes around 0.01 differ by many orders of magnitude: solved on a scaled domain, then converted.
    ascending = np.polynomial.Polynomial.fit(x, y, degree).convert().coef if degree else np.array([y.mean()])
    return tuple(float(one) for one in ascending[::-1])


def _first_calls(trajectory: Trajectory, types: dict[str, str]) -> Iterator[dict[str, Array]]:
    """Inputs of the first call of each step."""
    for t, calls in groupby(trajectory, key=lambda step: step["t"]):
        first = next(calls)
        yield step_feeds(first, types, Slot(float(t), first["branch"]))


def _change(before: Sequence[Array], now: Sequence[Array]) -> tuple[float, float]:
    return relative_change(now[0], before[0]), relative_change(now[1], before[1])
