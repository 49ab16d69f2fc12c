"""verify: is the bundle still the model? Per layer, per step, on whole clips, and in the runtime's own kernels.

What fails says which layer and bin. Thresholds come from the recipe the bundle was made with.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import onnxruntime

from vdq_export import float_model, ort, pipeline, sources, targets
from vdq_export.bundle import Bundle
from vdq_export.contract import PassContext
from vdq_export.errors import BundleError, ModelError
from vdq_export.graph import OUTPUT, Array, Graph
from vdq_export.metrics import bounded, db_text, decibels, psnr_db
from vdq_export.model import Model, Trajectory
from vdq_export.plan import QuantPlan
from vdq_export.progress import Reporter
from vdq_export.recipe import VerifyRecipe
from vdq_export.report.data import JudgeScores, KernelCount, LayerQuality, StepError, VerifyReport
from vdq_export.report.growth import Growth, mean
from vdq_export.runtime import load
from vdq_export.runtime.ahead import Ahead
from vdq_export.targets.ort_int8 import detect_isa
from vdq_export.trace import trace

CLIPS = 20  # compared unless told otherwise


@dataclass
class _Energy:
    """Sums of squares of one layer in one bin, and the timestep of its worst call."""

    signal: float = 0.0
    noise: float = 0.0
    worst_db: float = float("inf")
    worst_step: float = 0.0

    def add(self, reference: Array, other: Array, t: float) -> None:
        signal = float(np.sum(np.square(reference, dtype=np.float64)))
        noise = float(np.sum(np.square(np.subtract(reference, other, dtype=np.float64))))
        self.signal, self.noise = self.signal + signal, self.noise + noise
        if _db(signal, noise) < self.worst_db:
            self.worst_db, self.worst_step = _db(signal, noise), t


class ClipFigures(TypedDict):
    clips: int
    worst_psnr_db: float | None


@dataclass
class Clips:
    """The same cases by the float model and by the bundle, [C, F, H, W] in [0, 1] each; growth: of each case."""

    reference: list[Array] = field(default_factory=list)
    quantized: list[Array] = field(default_factory=list)
    growth: list[list[StepError]] = field(default_factory=list)

    def psnr_db(self) -> list[float]:
        """Of each case."""
        return [bounded(psnr_db(a, b)) for a, b in zip(self.reference, self.quantized, strict=True)]

    def mean_psnr_db(self) -> float:
        return float(np.mean(self.psnr_db()))

    def figures(self) -> ClipFigures:
        """How many they are, and the worst of them, as the report has it."""
        return {"clips": len(self.reference), "worst_psnr_db": min(self.psnr_db(), default=None)}


def verify(
    bundle: Bundle | str | Path,
    model: Model | str | None = None,
    *,
    clips: int | None = None,
    reporter: Reporter | None = None,
) -> VerifyReport:
    """Measure `bundle`, or the one in that folder, against its float model and judge it by its recipe's thresholds.

    The report's `verdict` is "pass" or "fail", with every threshold that was missed in `failures`. Arguments and errors
    are those of measure(), which returns the clips too.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return measure(opened, model, clips=clips, reporter=reporter)[0]


def measure(
    bundle: Bundle, model: Model | str | None = None, *, clips: int | None = None, reporter: Reporter | None = None
) -> tuple[VerifyReport, Clips]:
    """The verdict on `bundle`, and the clips it was judged by.

    model: the float model; by default the one the manifest names. clips: whole clips to compare, given a sampler;
    None: as many as it says (`clips`), else CLIPS.
    Raises ModelError when the model is not the one the bundle was made from, BundleError when it carries no plan.
    """
    reporter = reporter or Reporter()
    if not bundle.plans:
        raise BundleError(f"{bundle.path} carries no plan", hint="export it again")
    model = sources.of_bundle(bundle.manifest.model.name, model)
    thresholds = bundle.plans[0].recipe.verify
    layers: list[LayerQuality] = []
    for plan, floated, steps in float_graphs(bundle, model, reporter):
        layers += compare_layers(bundle, plan, floated, steps, reporter)
    kernels, floating = count_kernels(bundle, reporter)
    count = getattr(model.sampler, "clips", CLIPS) if clips is None else clips
    made = make_clips(bundle, model, count, reporter)
    return _verdict(bundle, model, thresholds, layers, kernels, floating, made), made


def float_graphs(bundle: Bundle, model: Model, reporter: Reporter) -> Iterator[tuple[QuantPlan, Graph, Trajectory]]:
    """For each plan of `bundle`: the float graph of `model` that it quantizes, and a trajectory of that network.

    Smoothed and rotated: what is folded into a producer changes what that layer puts out, in float and quantized graph
    alike. Raises ModelError when `bundle` was made from another model.
    """
    spec = targets.load(bundle.manifest.target).spec(bundle.manifest.isa)
    for expert, network in model.networks():
        with reporter.stage(f"trace {expert}".strip()):
            graph = trace(network, tolerance=bundle.plans[0].recipe.verify.max_float_error)
        float_model.check(bundle, model, model.weight_hash() if model.experts else graph.source)
        pipeline.run_passes(graph, pipeline.canonical(spec.name), PassContext(spec=spec))
        steps = _first_trajectory(network)
        for plan in (p for p in bundle.plans if p.expert == expert):
            floated = graph.copy()
            pipeline.run_passes(floated, pipeline.FLOAT, PassContext(plan, None, spec))
            yield plan, floated, steps


def compare_layers(
    bundle: Bundle, plan: QuantPlan, graph: Graph, trajectory: Trajectory, reporter: Reporter
) -> tuple[LayerQuality, ...]:
    """SQNR of every quantized layer's output, and of the network's output, fed with the float model's own inputs.

    graph: the float graph of `plan`, smoothed and rotated. Steps that no bin of the plan serves are left out.
    """
    outputs = {linear.name: linear.output.name for linear in graph.linears()}
    wanted = {layer.name: outputs[layer.name] for layer in plan.layers if layer.quantized} | {OUTPUT: OUTPUT}
    reference = ort.session(graph, outputs=list(wanted.values()))
    sums: dict[tuple[str, int], _Energy] = {}
    network, active = None, -1
    names = {i.name for i in graph.gs.inputs}
    mine = {one.index for one in plan.bins}
    with reporter.stage(f"compare layers {plan.name}".strip()) as advance, closing(Ahead(bundle)) as ahead:
        for done, step in enumerate(trajectory, 1):
            index = bundle.schedule.select(step["t"], step["branch"], precision=plan.precision)
            if index not in mine:
                continue
            if index != active or network is None:
                network, active = _Network(bundle, index, ahead, set(wanted.values())), index
            feeds = {n: v.numpy() for n, v in step["inputs"].items() if n in names}
            exact = reference.run(list(wanted.values()), feeds)
            actual = network.run(feeds)
            for (layer, name), a in zip(wanted.items(), exact, strict=True):
                sums.setdefault((layer, index), _Energy()).add(a, actual[name], step["t"])
            advance(done, len(trajectory))
    return tuple(
        LayerQuality(layer=layer, bin=index, sqnr_db=_db(e.signal, e.noise), worst_step=e.worst_step)
        for (layer, index), e in sums.items()
    )


class _Network:
    """The graphs that make up one bin, run for inner values: its own, and what was hoisted out of it.

    Raises BundleError for a value that none of them has.
    """

    def __init__(self, bundle: Bundle, index: int, ahead: Ahead, values: set[str]) -> None:
        self._index, self._ahead = index, ahead
        self._sessions: list[tuple[onnxruntime.InferenceSession, list[str]]] = []
        hoisted, missing = bundle.schedule.ahead(index), set(values)
        for path in [bundle.graph_path(index), *(bundle.path / one for one in (hoisted.graphs if hoisted else ()))]:
            graph = Graph.load(path)
            found = sorted(missing & {value.name for node in graph.nodes for value in node.outputs})
            # Hoisted graphs as they stand: onnxruntime would take weights of 8 bits for leave to quantize activations.
            of_bin = not self._sessions
            options = bundle.manifest.session if of_bin else {}
            if found or of_bin:
                self._sessions.append((ort.session(graph, outputs=found, options=options, exact=not of_bin), found))
            missing -= set(found)
        if missing:
            raise BundleError(f"no graph of bin {index} has the layer output {min(missing)}", hint="export it again")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """{value: what it is} for the model's inputs."""
        made: dict[str, Array] = {}
        for session, names in self._sessions:
            given = self._ahead.arrays(self._index, session, feeds)
            made |= dict(zip(names, session.run(names, given), strict=True))
        return made


def count_kernels(bundle: Bundle, reporter: Reporter | None = None) -> tuple[KernelCount, list[str]]:
    """Planned integer linears over all bins, those that run as such, and the others' names.

    Asked is onnxruntime's optimised graph, or the target's own programs where it has some.
    """
    target = targets.load(bundle.manifest.target)
    planned, floating = 0, list[str]()
    bins = [(plan, one) for plan in bundle.plans for one in plan.bins]
    if (fused_layers := getattr(target, "fused_layers", None)) is not None:
        for plan, one in bins:
            fused: dict[str, bool] = fused_layers(bundle.path, one.index, plan.of_bin(one))
            planned += len(fused)
            floating += [f"{layer} in {one.name}" for layer, is_fused in fused.items() if not is_fused]
        return _counted(planned, floating), floating
    stage = (reporter or Reporter()).stage("count kernels")
    with stage as advance, tempfile.TemporaryDirectory() as folder:
        for number, (plan, one) in enumerate(bins, 1):
            path = Path(folder) / f"{one.name}.onnx"
            ort.session(
                Graph.load(bundle.graph_path(one.index)), options=bundle.manifest.session, optimised_path=str(path)
            )
            found = target.integer_layers(path, plan.of_bin(one))
            planned += len(found)
            floating += [f"{layer} in {one.name}" for layer, integer in found.items() if not integer]
            advance(number, len(bins))
    return _counted(planned, floating), floating


def _counted(planned: int, floating: Sequence[str]) -> KernelCount:
    return KernelCount(planned=planned, executed=planned - len(floating), floating=tuple(floating))


def make_clips(
    bundle: Bundle,
    model: Model,
    count: int,
    reporter: Reporter,
    *,
    policy: str | None = None,
    providers: str | None = None,
    reference: Sequence[Array] = (),
) -> Clips:
    """The same cases generated by the float model and by the bundle; none for a model without a sampler.

    reference: the float model's clips where somebody made them already; the growth of the error is not seen then.
    """
    made = Clips()
    if model.sampler is None or count == 0:
        return made
    loaded = load(bundle.path, policy=policy, providers=providers)
    with reporter.stage("generate clips") as advance, loaded as transformer:
        for case in range(count):
            growth = Growth(model.timestep_input)
            known = case < len(reference)
            made.reference.append(reference[case] if known else model.clip(model.module, case, growth.reference))
            advance(2 * case + 1, 2 * count)
            made.quantized.append(model.clip(transformer, case, growth.quantized))
            made.growth.append(growth.steps)
            advance(2 * case + 2, 2 * count)
    return made


def _first_trajectory(model: Model) -> Trajectory:
    for trajectory in model.iter_trajectories():
        return list(trajectory)
    raise ModelError(f"{model.name} brings no trajectories", hint="verify needs at least one recorded trajectory")


def _verdict(
    bundle: Bundle,
    model: Model,
    thresholds: VerifyRecipe,
    layers: Sequence[LayerQuality],
    kernels: KernelCount,
    floating: Sequence[str],
    made: Clips,
) -> VerifyReport:
    failures = [
        f"{q.layer} in bin{q.bin:02d}: SQNR {db_text(q.sqnr_db, thresholds.min_layer_sqnr_db)} is below "
        f"{thresholds.min_layer_sqnr_db:g}, "
        f"worst at t={q.worst_step:g}"
        for q in layers
        if q.sqnr_db < thresholds.min_layer_sqnr_db
    ]
    if kernels.planned and kernels.executed / kernels.planned < thresholds.min_integer_coverage:
        failures.append(f"{len(floating)} of {kernels.planned} planned linears run in float: {', '.join(floating[:5])}")
    psnr, scores, worse = judge_clips(model, made, thresholds, layers)
    failures += worse
    return VerifyReport(
        verdict="fail" if failures else "pass",
        bundle_bytes=bundle.size,
        integer_kernels=kernels,
        psnr_db=psnr,
        judge=scores,
        layers=tuple(layers),
        failures=tuple(failures),
        growth=mean(made.growth),
        machine=f"{platform.system()} {platform.machine()} ({detect_isa()}), onnxruntime {onnxruntime.__version__}",
        **made.figures(),
    )


def judge_clips(
    model: Model, made: Clips, thresholds: VerifyRecipe, layers: Sequence[LayerQuality], where: str = "clips"
) -> tuple[float | None, JudgeScores | None, list[str]]:
    """(mean PSNR, the judge's scores of both sets of clips, what misses a threshold, one line each).

    None where no clips were made; no scores for a model without a judge. layers: the weakest is named.
    """
    if not made.reference:
        return None, None, []
    failures = []
    psnr, wanted = made.mean_psnr_db(), thresholds.min_psnr_db
    weakest = _worst(layers) + ("; which layers cost the clips: vdq-export bisect" if where == "clips" else "")
    if psnr < wanted:
        failures.append(f"{where}: PSNR {db_text(psnr, wanted)} is below {wanted:g}; {weakest}")
    if model.judge is None:
        return psnr, None, failures
    cases = range(len(made.reference))
    scores = JudgeScores(float_=model.judge(made.reference, cases), quantized=model.judge(made.quantized, cases))
    for measure, before in scores.float_.items():
        drop = before - scores.quantized[measure]
        if drop > thresholds.max_judge_drop + 1e-9:
            failures.append(f"judge: {measure} fell by {drop:.3f}, allowed {thresholds.max_judge_drop:g}; {weakest}")
    return psnr, scores, failures


def _worst(layers: Sequence[LayerQuality]) -> str:
    """The weakest by itself need not be what costs the clips most: errors of other layers cancel or are amplified."""
    weakest = min(layers, key=lambda q: q.sqnr_db)
    return f"weakest by itself: {weakest.layer} in bin{weakest.bin:02d} ({weakest.sqnr_db:.1f} dB)"


def _db(signal: float, noise: float) -> float:
    return bounded(decibels(signal, noise))
