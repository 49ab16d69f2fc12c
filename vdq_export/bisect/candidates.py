"""The (layer, bin) of a bundle that could be put back to float, and what each alone does to the network's output."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from vdq_export import ort
from vdq_export.bisect.float_layers import put_back
from vdq_export.bundle import Bundle
from vdq_export.graph import OUTPUT, Array, Graph, Linear
from vdq_export.model import Model, Trajectory
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.progress import Reporter
from vdq_export.runtime.ahead import Ahead
from vdq_export.verify import float_graphs

STEPS = 2  # of a bin that effects are measured on: its first and its last


class Place(NamedTuple):
    """A layer in one bin."""

    layer: str
    bin: int


@dataclass(frozen=True)
class Candidate:
    """A quantized layer of one bin's graph. linear: it in the float graph. weights: tells sets of weights apart."""

    place: Place
    plan: LayerPlan
    linear: Linear
    weights: int


@dataclass(frozen=True)
class Calls:
    """Calls of the network that one bin serves. feeds: of some of them, the model's inputs by name; exact: what the
    float network gives for those; count: of all of one trajectory."""

    feeds: tuple[dict[str, Array], ...]
    exact: tuple[Array, ...]
    count: int


def candidates(bundle: Bundle, model: Model, reporter: Reporter) -> tuple[list[Candidate], dict[int, Calls]]:
    """Every (layer, bin) that is quantized, and for each bin calls to measure on.

    Raises ModelError when `model` is not the one `bundle` was made from.
    """
    found, calls, known = list[Candidate](), dict[int, Calls](), list[tuple[object, ...]]()
    networks = dict(model.networks())
    for plan, graph, trajectory in float_graphs(bundle, model, reporter):
        linears = {linear.name: linear for linear in graph.linears()}
        weights = (plan.expert, *((x.name, x.smoothing, x.rotation, x.weight) for x in plan.layers))
        if weights not in known:  # the two precisions of a schedule share them
            known.append(weights)
        number = known.index(weights)
        for one in plan.bins:
            here = [x for x in plan.of_bin(one).layers if x.quantized]
            found += [Candidate(Place(x.name, one.index), x, linears[x.name], number) for x in here]
            calls[one.index] = _calls(bundle, plan, one.index, networks[plan.expert], trajectory)
    return found, calls


def _calls(bundle: Bundle, plan: QuantPlan, index: int, network: Model, trajectory: Trajectory) -> Calls:
    mine = [s for s in trajectory if bundle.schedule.select(s["t"], s["branch"], precision=plan.precision) == index]
    some = [mine[i] for i in sorted({0, len(mine) - 1})][:STEPS] if mine else []
    with torch.no_grad():
        exact = [network(**step["inputs"]).numpy().astype(np.float64) for step in some]
    feeds = [{name: value.numpy() for name, value in step["inputs"].items()} for step in some]
    return Calls(tuple(feeds), tuple(exact), len(mine))


def effects(
    bundle: Bundle, found: Sequence[Candidate], calls: dict[int, Calls], reporter: Reporter
) -> tuple[dict[Place, float], float]:
    """(by how much each candidate alone, put back, lowers the error of the network's output; that error).

    Errors are sums of squares over the calls of the candidate's bin, and of all bins together, each call fed with the
    float model's own inputs. Effects may be negative, and of a bin that no call is for they are 0.
    """
    fall, whole, done = dict.fromkeys((one.place for one in found), 0.0), 0.0, 0
    with reporter.stage("effects of layers") as advance, closing(Ahead(bundle)) as ahead:
        for index in sorted(calls):
            graph = Graph.load(bundle.graph_path(index))
            before = _error(bundle, graph, index, calls[index], ahead)
            whole += before
            for one in (x for x in found if x.place.bin == index):
                edited = graph.copy()
                put_back(edited, [one.linear])
                fall[one.place] = before - _error(bundle, edited, index, calls[index], ahead)
                advance(done := done + 1, len(found))
    return fall, whole


def _error(bundle: Bundle, graph: Graph, index: int, calls: Calls, ahead: Ahead) -> float:
    if not calls.feeds:
        return 0.0
    session = ort.session(graph, options=bundle.manifest.session)
    total = 0.0
    for feeds, exact in zip(calls.feeds, calls.exact, strict=True):
        (made,) = session.run([OUTPUT], ahead.arrays(index, session, feeds))
        total += float(np.square(np.asarray(made, np.float64) - exact).sum())
    return total * calls.count / len(calls.feeds)
