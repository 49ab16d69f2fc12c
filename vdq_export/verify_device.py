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
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime import InferenceSession as Session

from vdq_export import ort, sources
from vdq_export.bisect import MARGIN_DB, bisect
from vdq_export.bundle import Bundle
from vdq_export.errors import CompileError, ModelError
from vdq_export.graph import Array, Graph
from vdq_export.graph_cut import quantizer, settled
from vdq_export.metrics import LIMIT_DB, bounded, bounded_sqnr_db, decibels
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
from vdq_export.trace import OUTPUT
from vdq_export.verify import Clips, judge_clips

# Device and exact evaluator agree to a thousandth of the output: no bin fails by what is left, even where quantization
# costs next to nothing. Below 51 dB against float the margin alone decides.
NEGLIGIBLE_DB = 60.0


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


@dataclass
class _Noise:
    """Sums of squares over the calls of one bin: of the float result and of three differences."""

    signal: float = 0.0
    exact: float = 0.0
    device: float = 0.0
    between: float = 0.0
    worst: tuple[float, float] = (LIMIT_DB, 0.0)  # (SQNR of the device, t) of the worst call
    seconds: list[float] = field(default_factory=list)

    def add(self, reference: Array, exact: Array, device: Array, t: float) -> None:
        self.signal += _energy(reference)
        self.exact += _energy(reference - exact)
        self.device += _energy(reference - device)
        self.between += _energy(exact - device)
        self.worst = min(self.worst, (bounded_sqnr_db(reference, device), t))


def verify_device(
    bundle: Bundle, model: Model | str | None = None, choices: Choices = Choices(), reporter: Reporter | None = None
) -> VerifyReport:
    """Measure `bundle` on the HTP emulator. model: the float model; by default the one the manifest names.

    Raises ModelError for a model the bundle was not made from or without steps for a bin, MissingToolError without
    onnxruntime-qnn, UnknownNameError for an architecture that is not supported.
    """
    reporter = reporter or Reporter()
    hexagon.provider_options(choices.arch)
    model = sources.resolve(model or bundle.manifest.model.name)
    if model.weight_hash() != bundle.manifest.model.weight_hash:
        raise ModelError(f"{model.name} has other weights than the model of {bundle.path}", hint="pass its own model")
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
    return _verdict(bundle, model, device, layers, made)


def calls_by_bin(bundle: Bundle, model: Model, count: int) -> dict[int, list[Step]]:
    """Up to `count` calls of each bin, spread over its steps in the float model's first trajectory.

    Raises ModelError when a bin has none.
    """
    first = next(iter(model.iter_trajectories()), None)
    if first is None:
        raise ModelError(f"{model.name} brings no trajectories", hint="verify needs at least one recorded trajectory")
    steps: dict[int, list[Step]] = {one.index: [] for plan in bundle.plans for one in plan.bins}
    for step in first:
        for precision in {plan.precision for plan in bundle.plans}:
            steps[bundle.schedule.select(step["t"], step["branch"], precision=precision)].append(step)
    for index, mine in steps.items():
        if not mine:
            raise ModelError(f"no step of {model.name}'s first trajectory is bin{index:02d}'s")
    spread = {index: np.linspace(0, len(mine) - 1, min(count, len(mine))).round() for index, mine in steps.items()}
    return {index: [steps[index][int(place)] for place in places] for index, places in spread.items()}


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
    noise = _Noise()
    with closing(Ahead(bundle)) as ahead:
        for call in calls:
            feeds = ahead.arrays(index, exact, _inputs(bundle, call))
            reference = model(**call["inputs"]).numpy()
            begin = time.perf_counter()
            device = session.run([output], feeds)[0]
            noise.seconds.append(time.perf_counter() - begin)
            noise.add(reference, exact.run([output], feeds)[0], device, call["t"])
    exact_db, device_db, between = (
        _db(noise.signal, noise.exact),
        _db(noise.signal, noise.device),
        _db(noise.signal, noise.between),
    )
    measured = DeviceBin(
        bin=index,
        steps=len(calls),
        exact_db=exact_db,
        device_db=device_db,
        drop_db=exact_db - device_db,
        agreement_db=between,
        compile_seconds=compiled,
        run_seconds=float(np.mean(noise.seconds)),
        off_device=left,
        scales=scales,
    )
    return measured, noise.worst[1], session


def _inputs(bundle: Bundle, call: Step) -> dict[str, Array]:
    return {one.name: call["inputs"][one.name].numpy() for one in bundle.manifest.signature.inputs}


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
            made.reference.append(model.sampler.generate(model.module, case))
            begin = time.perf_counter()
            made.quantized.append(model.sampler.generate(transformer, case))
            seconds.append(time.perf_counter() - begin)
            advance(case + 1, count)
    return made, float(np.mean(seconds))


def _on_cpu(family: Family) -> Session:
    return Session(str(family.graph), providers=[CPU])


def bisect_file(path: Path, arch: str = "v75", out: Path | None = None, reporter: Reporter | None = None) -> Bisection:
    """bisect() of a quantized .onnx file on random inputs within its ranges. Raises ModelError for dynamic shapes."""
    hexagon.provider_options(arch)
    try:
        graph = Graph.load(path)
    except DecodeError as error:
        raise ModelError(f"{path} is not an ONNX model") from error
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
        feeds = ahead.arrays(index, ort.session(graph, exact=True), _inputs(bundle, calls[index][0]))
    return bisect(
        graph,
        feeds,
        arch=choices.arch,
        ceiling_db=NEGLIGIBLE_DB,
        label=bundle.schedule.bins[index].graph,
        out=choices.out,
        reporter=reporter,
    )


def bin_failures(one: DeviceBin) -> list[str]:
    """What is wrong with a bin, one line each."""
    name = f"bin{one.bin:02d}"
    if one.error:
        return [f"{name}: does not compile: {one.error}"]
    found = []
    agrees = one.agreement_db is None or one.agreement_db > NEGLIGIBLE_DB
    if one.drop_db is not None and one.drop_db > MARGIN_DB and not agrees:
        found.append(
            f"{name}: {one.device_db:.2f} dB on the device, {one.exact_db:.2f} by the exact evaluator: "
            f"more than {MARGIN_DB:g} dB lost"
        )
    if one.off_device:
        found.append(f"{name}: {len(one.off_device)} nodes do not run on the device: {', '.join(one.off_device[:5])}")
    if one.scales is not None and (wrong := (*one.scales.mismatches, *one.scales.foreign)):
        found.append(f"{name}: {len(wrong)} quantizers differ in the compiled graph: {', '.join(wrong[:5])}")
    return found


def _verdict(
    bundle: Bundle, model: Model, device: DeviceReport, layers: Sequence[LayerQuality], made: Clips
) -> VerifyReport:
    thresholds = bundle.plans[0].recipe.verify
    failures = [line for one in device.bins for line in bin_failures(one)]
    psnr, scores, worse = judge_clips(model, made, thresholds, layers, "clips on the device")
    failures += worse
    return VerifyReport(
        verdict="fail" if failures else "pass",
        bundle_bytes=bundle.size,
        integer_kernels=_on_device(bundle, device),
        psnr_db=psnr,
        judge=scores,
        layers=tuple(layers),
        failures=tuple(failures),
        device=device,
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


def _energy(values: Array) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def _db(signal: float, noise: float) -> float:
    return bounded(decibels(signal, noise))
