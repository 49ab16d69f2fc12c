"""verify --device: does the device compute what the bundle's graphs say? Per bin, and on whole clips.

Each bin's graph is run by onnxruntime's CPU provider with nothing fused, which is exact, and by the device; both are
compared with the float model on inputs of its own first trajectory. What is lost between the two is the device's doing:
quantization itself is in both.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import InferenceSession as Session

from vdq_export import float_model, ort
from vdq_export.bundle import Bundle
from vdq_export.devices.checks import (
    NEGLIGIBLE_DB,
    Noise,
    bin_failures,
    calls_by_bin,
    inputs_of,
    verdict,
)
from vdq_export.devices.first_difference import bisect
from vdq_export.errors import BundleError, CompileError, ModelError
from vdq_export.graph import OUTPUT, Array, Graph
from vdq_export.graphs.cut import quantizer, settled
from vdq_export.model import Model, Step
from vdq_export.plan import Bin, QuantPlan
from vdq_export.progress import Reporter
from vdq_export.report.data import KernelCount, LayerQuality, VerifyReport
from vdq_export.report.device import Bisection, DeviceBin, DeviceReport
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.families import Family, alone
from vdq_export.runtime.probes import Probes
from vdq_export.runtime.providers import CPU
from vdq_export.runtime.transformer import Transformer
from vdq_export.targets.qnn import dump, hexagon
from vdq_export.verify import Clips


@dataclass(frozen=True)
class Choices:
    """What to measure. steps: calls of each bin; the emulator needs about a second for one of a 2.5 M parameter model.

    bisect: search the first bin that fails; out: where the suspect alone is saved.
    """

    arch: str = "v75"
    steps: int = 2
    clips: int = 1
    bisect: bool = False
    out: Path | None = None


def verify_device(
    bundle: Bundle, model: Model | str | None = None, choices: Choices = Choices(), reporter: Reporter | None = None
) -> VerifyReport:
    """Measure `bundle` on the HTP emulator. model: the float model; by default the one the manifest names.

    Raises BundleError for a bundle of another target, ModelError for a model the bundle was not made from or without
    steps for a bin, MissingToolError without onnxruntime-qnn, UnknownNameError for an architecture that is unknown.
    """
    reporter = reporter or Reporter()
    hexagon.provider_options(choices.arch)
    if (made_for := bundle.manifest.target) != "qnn":
        raise BundleError(f"{bundle.path} was made for {made_for}, not for qnn", hint="export --target qnn")
    model = float_model.find(bundle, model)
    calls = calls_by_bin(bundle, model, choices.steps)
    found: list[DeviceBin] = []
    layers: list[LayerQuality] = []
    sessions: dict[int, Session] = {}
    with reporter.stage("bins on the device") as advance:
        for index in sorted(calls):
            measured, worst_step, session = _measure(bundle, model, index, calls[index], choices.arch)
            found.append(measured)
            if session is not None and measured.device_db is not None:
                layers.append(LayerQuality(layer=OUTPUT, bin=index, sqnr_db=measured.device_db, worst_step=worst_step))
                sessions[index] = session
            advance(len(found), len(calls))
    ready = len(sessions) == len(found)
    made, clip_seconds = _clips(bundle, model, sessions, choices.clips if ready else 0, reporter)
    failed = [one for one in found if bin_failures(one)]
    searched = _search(bundle, failed[0].bin, calls, choices, reporter) if choices.bisect and failed else None
    device = DeviceReport(
        device="htp-emulator",
        arch=choices.arch,
        tool=f"onnxruntime-qnn {metadata.version('onnxruntime-qnn')}",
        bins=tuple(found),
        clips=len(made.reference),
        clip_seconds=clip_seconds,
        bisection=searched,
    )
    return verdict(bundle, model, device, _on_device(bundle, device), layers, made)


def _measure(
    bundle: Bundle, model: Model, index: int, calls: Sequence[Step], arch: str
) -> tuple[DeviceBin, float, Session | None]:
    """(the bin as measured, t of its worst call, its session on the device unless the compiler refused it)"""
    path, output = bundle.graph_path(index), bundle.manifest.signature.outputs[0].name
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = hexagon.emulator(path, arch, strict=False, dump_json=Path(folder))
        except CompileError as error:
            return DeviceBin(bin=index, steps=0, error=str(error)), 0.0, None
        compiled = time.perf_counter() - start
        left = tuple(hexagon.left_over(session))
        graph = Graph.load(path)
        scales = dump.compare(graph, dump.read(Path(folder)))
    exact = ort.session(graph, exact=True)
    noise = Noise()
    with closing(Ahead(bundle)) as ahead:
        for call in calls:
            feeds = ahead.arrays(index, exact, inputs_of(bundle, call))
            reference = model(**call["inputs"]).numpy()
            begin = time.perf_counter()
            device = session.run([output], feeds)[0]
            noise.seconds.append(time.perf_counter() - begin)
            noise.add(reference, exact.run([output], feeds)[0], device, call["t"])
    measured = DeviceBin(
        bin=index,
        steps=len(calls),
        **noise.figures(),
        compile_seconds=compiled,
        off_device=left,
        scales=scales,
    )
    return measured, noise.worst[1], session


def _clips(
    bundle: Bundle, model: Model, sessions: Mapping[int, Session], count: int, reporter: Reporter
) -> tuple[Clips, float | None]:
    """(cases 0 … count−1 by the float model and by the runtime on the device's sessions, seconds per device clip)"""
    made, seconds = Clips(), []
    if model.sampler is None or not count:
        return made, None

    def compiled(family: Family) -> Session:
        return sessions[family.bins[0]]

    graphs = [bundle.graph_path(index) for index in range(len(bundle.schedule.bins))]
    ahead = Ahead(bundle)
    engine = Engine(alone(graphs), bundle.schedule, compiled, ahead, prefetch=False)
    probes = Probes(bundle.path, bundle.schedule.reuse, bundle.manifest.signature, _on_cpu, ahead)
    with (
        reporter.stage("clips on the device") as advance,
        Transformer(bundle, bundle.schedule, engine, probes) as transformer,
    ):
        for case in range(count):
            made.reference.append(model.clip(model.module, case))
            begin = time.perf_counter()
            made.quantized.append(model.clip(transformer, case))
            seconds.append(time.perf_counter() - begin)
            advance(case + 1, count)
    return made, float(np.mean(seconds))


def _on_cpu(family: Family) -> Session:
    return Session(str(family.graph), providers=[CPU])


def bisect_file(path: Path, arch: str = "v75", out: Path | None = None, reporter: Reporter | None = None) -> Bisection:
    """bisect() of a quantized .onnx file on random inputs within its ranges. Raises ModelError for dynamic shapes."""
    hexagon.provider_options(arch)
    graph = Graph.load(path)
    return bisect(graph, random_feeds(graph), arch=arch, label=path.name, out=out, reporter=reporter)


def random_feeds(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Inputs for a graph without a model: normal within the range of the quantizer behind an input; integers are 0."""
    random, feeds = np.random.default_rng(seed), {}
    for one in graph.gs.inputs:
        shape: list[Any] = [None] if one.shape is None else list(one.shape)
        if not all(isinstance(size, int) for size in shape):
            raise ModelError(f"input {one.name!r} has the shape {shape}", hint="the device takes static shapes only")
        low, high = -3.0, 3.0
        if (found := quantizer(settled(one)[0])) is not None and found.axis is None:
            ends = np.iinfo(found.dtype)
            low, high = (float(found.scale) * (end - int(found.zero_point)) for end in (ends.min, ends.max))
        values = np.clip(random.normal((low + high) / 2, (high - low) / 6, shape), low, high)
        feeds[str(one.name)] = (values if np.issubdtype(one.dtype, np.floating) else values * 0).astype(one.dtype)
    return feeds


def _search(
    bundle: Bundle, index: int, calls: Mapping[int, Sequence[Step]], choices: Choices, reporter: Reporter
) -> Bisection:
    """bisect() of one bin, on the first of its calls."""
    graph = Graph.load(bundle.graph_path(index))
    with closing(Ahead(bundle)) as ahead:
        feeds = ahead.arrays(index, ort.session(graph, exact=True), inputs_of(bundle, calls[index][0]))
    return bisect(
        graph,
        feeds,
        arch=choices.arch,
        ceiling_db=NEGLIGIBLE_DB,
        label=bundle.schedule.bins[index].graph,
        out=choices.out,
        reporter=reporter,
    )


def _on_device(bundle: Bundle, device: DeviceReport) -> KernelCount:
    """Planned linears over all bins, and those whose MatMul runs on the device."""
    plans: dict[int, tuple[QuantPlan, Bin]] = {one.index: (plan, one) for plan in bundle.plans for one in plan.bins}
    planned = executed = 0
    for one in device.bins:
        linears = {layer.name for layer in plans[one.bin][0].of_bins().layers if layer.quantized}
        floating = {node.split(" ", 1)[1].rsplit("/", 1)[0] for node in one.off_device}
        planned += len(linears)
        executed += 0 if one.error else len(linears - floating)
    return KernelCount(planned=planned, executed=executed)
