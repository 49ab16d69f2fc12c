"""A bundle with some of its layers put back to float, bin by bin, without exporting it again.

A layer's product is computed from the value it read before quantization and the float weight, smoothed and rotated as
the plan says, and takes the place of what the bundle's graph made of it: quantizers, integers, low-rank branches go.
That is the graph an export has with the layer kept in float in this bin (calib/float_bins.py).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnxruntime

from vdq_export import ort
from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ModelError
from vdq_export.graph import Graph, Linear, Value
from vdq_export.metrics import LIMIT_DB, bounded, decibels, psnr_db
from vdq_export.model import Model, Trajectory
from vdq_export.plan import LayerPlan, QuantPlan
from vdq_export.progress import Advance, Reporter
from vdq_export.runtime import families
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.families import Family
from vdq_export.runtime.probes import Probes
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.transformer import Transformer
from vdq_export.verify import float_graphs

_QUANTIZING = ("DequantizeLinear", "QuantizeLinear", "Clip")
_DYNAMIC = re.compile(r"(.*)/Dynamic(_\d+)?$")  # what passes/dynamic_quantize.py calls a quantized value
STEPS = 2  # of a bin that errors are measured on
SESSIONS, KEPT_BYTES = 24, 4 << 30  # kept, while they fit: runs that follow each other differ in few bins


class Place(NamedTuple):
    """A layer in one bin."""

    layer: str
    bin: int


@dataclass(frozen=True)
class Candidate:
    """A quantized layer of one bin's graph. linear: it in the float graph. weights: tells sets of weights apart.

    sqnr_db: of its output in the bundle's graph against the float product of what it reads there: its own error,
    without what comes from the layers before it.
    """

    place: Place
    plan: LayerPlan
    linear: Linear
    weights: int
    sqnr_db: float


def candidates(bundle: Bundle, model: Model, reporter: Reporter) -> list[Candidate]:
    """Every (layer, bin) that is quantized, the largest own error first.

    Raises ModelError when `model` is not the one `bundle` was made from.
    """
    found, known = list[Candidate](), list[tuple[object, ...]]()
    for plan, graph, trajectory in float_graphs(bundle, model, reporter):
        linears = {linear.name: linear for linear in graph.linears()}
        weights = (plan.expert, *((x.name, x.smoothing, x.rotation, x.weight) for x in plan.layers))
        if weights not in known:  # the two precisions of a schedule share them
            known.append(weights)
        with reporter.stage(f"errors of layers {plan.name}".strip()) as advance:
            for done, one in enumerate(plan.bins, 1):
                here = {x.name: x for x in plan.of_bin(one).layers if x.quantized}
                errors = _own_errors(bundle, plan, one.index, [linears[name] for name in here], trajectory)
                number = known.index(weights)
                found += [
                    Candidate(Place(name, one.index), layer, linears[name], number, errors[name])
                    for name, layer in here.items()
                ]
                advance(done, len(plan.bins))
    return sorted(found, key=lambda one: one.sqnr_db)  # stable: equal ones as the graph has them


def _own_errors(
    bundle: Bundle, plan: QuantPlan, index: int, linears: Sequence[Linear], trajectory: Trajectory
) -> dict[str, float]:
    """SQNR (dB) of each layer's own error in bin `index`, over a few steps of `trajectory`; of those that no step is
    for LIMIT_DB."""
    steps = [s for s in trajectory if bundle.schedule.select(s["t"], s["branch"], precision=plan.precision) == index]
    steps = [steps[i] for i in sorted({0, len(steps) - 1})][:STEPS] if steps else []
    if not steps or not linears:
        return dict.fromkeys((x.name for x in linears), LIMIT_DB)
    graph = Graph.load(bundle.graph_path(index))
    values = graph.values()
    ends = {x.name: tuple(one.name for one in _ends(values, x)) for x in linears}
    given = {one.name for one in graph.gs.inputs}
    names = sorted({name for pair in ends.values() for name in pair} - given)
    session = ort.session(graph, outputs=names, options=bundle.manifest.session)
    signal, noise = dict.fromkeys((x.name for x in linears), 0.0), dict.fromkeys((x.name for x in linears), 0.0)
    with closing(Ahead(bundle)) as ahead:
        for step in steps:
            feeds = ahead.arrays(index, session, {name: v.numpy() for name, v in step["inputs"].items()})
            made = feeds | dict(zip(names, session.run(names, feeds), strict=True))
            for x in linears:
                read, written = (made[name] for name in ends[x.name])
                exact = read @ np.asarray(x.read_weight(), np.float32)
                exact = (exact if x.bias is None else exact + x.bias.values).reshape(written.shape)
                signal[x.name] += float(np.square(exact, dtype=np.float64).sum())
                noise[x.name] += float(np.square(exact - written, dtype=np.float64).sum())
    return {name: bounded(decibels(signal[name], noise[name])) for name in signal}


def put_back(graph: Graph, linears: Iterable[Linear]) -> None:
    """Let `graph`, of a bin, compute these layers in float. Raises BundleError where it does not have them."""
    for one in linears:
        value, output = _ends(graph.values(), one)
        path, shape = one.name, [*value.shape[:-1], one.shape[1]]
        weight = graph.derived(graph.fresh(f"{path}.weight.float"), one.weight, np.asarray, dtype=np.float32)
        made = graph.add_node("MatMul", [value, weight], graph.fresh(f"{path}/Float"), dtype=np.float32, shape=shape)
        if one.bias is not None:
            bias = graph.constant(graph.fresh(f"{path}.bias.float"), one.bias.values)
            made = graph.add_node("Add", [made, bias], graph.fresh(f"{path}/Biased"), dtype=np.float32, shape=shape)
        if shape != list(output.shape):
            sizes = graph.constant(graph.fresh(f"{path}/Shaped.shape"), np.array(output.shape, np.int64))
            name = graph.fresh(f"{path}/Shaped")
            made = graph.add_node("Reshape", [made, sizes], name, dtype=np.float32, shape=list(output.shape))
        name = output.name
        graph.replace_uses(output, made)
        if output.name == name:  # no output of the graph: layers behind find what they read by its name
            output.name, made.name = graph.fresh(f"{name}/quantized"), name
    graph.cleanup()


def _ends(values: Mapping[str, Value], linear: Linear) -> tuple[Value, Value]:
    """(what the layer reads before it is quantized, what it gives) in a bin's graph with these values.

    Both have the names they have in the float graph, but where a target's own pass has fused what made the input: then
    it is found behind the product with the integer weight. Raises BundleError where neither is there.
    """
    value, output = values.get(linear.matmul.inputs[0].name), values.get(linear.output.name)
    weight = values.get(f"{linear.name}/Weight")
    if value is None and weight is not None:
        value = weight.outputs[0].inputs[0]
        while value.inputs and value.inputs[0].op in _QUANTIZING:
            value = value.inputs[0].inputs[0]
        if (named := _DYNAMIC.match(value.name)) is not None:
            value = values.get(named[1])
    if value is None or output is None:
        raise BundleError(f"no graph of a bin has {linear.name} as its plan has it", hint="export it again")
    return value, output


class Trials:
    """Clips made with some layers in float, against those of the float model. Counts its runs; close() it.

    Mean PSNR (dB) of the clips 0 … count − 1: those that `verify --clips` compares.
    """

    def __init__(self, bundle: Bundle, model: Model, found: Sequence[Candidate], count: int, advance: Advance) -> None:
        if model.sampler is None:
            raise ModelError(
                f"{model.name} has no sampler, so there are no clips to measure",
                hint="give its Model a sampler; `vdq-export verify` compares layers without one",
            )
        self._bundle, self._model = bundle, model
        self._linears = {one.place: one.linear for one in found}
        self._sessions: OrderedDict[tuple[int, frozenset[str]], onnxruntime.InferenceSession] = OrderedDict()
        self._families = families.alone([bundle.graph_path(index) for index in range(len(bundle.schedule.bins))])
        self._ahead = Ahead(bundle)
        self._exact = []
        for case in range(count):
            self._exact.append(self._model.clip(model.module, case))
            advance(case + 1, count)
        self.runs = 0

    def __call__(self, places: Iterable[Place]) -> float:
        """dB with `places` in float."""
        chosen: dict[int, set[str]] = {}
        for place in places:
            chosen.setdefault(place.bin, set()).add(place.layer)

        def session(family: Family) -> onnxruntime.InferenceSession:
            (index,) = family.bins
            return self._session(index, frozenset(chosen.get(index, ())))

        self.runs += 1
        schedule, bundle = self._bundle.schedule, self._bundle
        engine = Engine(self._families, schedule, session, self._ahead, prefetch=False)
        probes = Probes(
            bundle.path, schedule.reuse, bundle.manifest.signature, SessionFactory(Backend(), {}, None), self._ahead
        )
        with Transformer(bundle, schedule, engine, probes) as transformer:
            made = [self._model.clip(transformer, case) for case in range(len(self._exact))]
        found = [bounded(psnr_db(a, b)) for a, b in zip(self._exact, made, strict=True)]
        return float(np.mean(found))

    def _session(self, index: int, layers: frozenset[str]) -> onnxruntime.InferenceSession:
        key = index, layers
        if key not in self._sessions:
            graph = Graph.load(self._bundle.graph_path(index))
            put_back(graph, [self._linears[Place(name, index)] for name in sorted(layers)])
            self._sessions[key] = ort.session(graph, options=self._bundle.manifest.session)
            while len(self._sessions) > min(SESSIONS, max(1, KEPT_BYTES // self._bundle.size)):
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def close(self) -> None:
        self._sessions.clear()
        self._ahead.close()
