"""export(): the whole compiler on one screen. Model -> graph -> record -> plan -> one graph a bin -> bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdq_export import pipeline, sources, targets
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.calib.bins import Tsw, check_count
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.solve import solve
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import CalibrationError, PassError
from vdq_export.graph import Graph
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.model import Model
from vdq_export.passes.smoothing import settle
from vdq_export.plan import QuantPlan
from vdq_export.progress import Reporter
from vdq_export.schedule import Schedule
from vdq_export.target_spec import TargetSpec
from vdq_export.trace import trace

Dump = Callable[[str, Graph], None]


@dataclass(frozen=True)
class Planned:
    """What is known before any graph is quantized."""

    model: Model
    spec: TargetSpec
    graph: Graph  # canonical float graph
    plan: QuantPlan
    reports: list[PassReport]


def export(
    model: Model | str = sources.DEFAULT,
    *,
    target: str = "ort-int8",
    tsw: int | str = 4,
    recipe: str = "static-asq",
    out: str | Path = "bundle",
    force: bool = False,
    strict: bool = False,
    dump: Dump | None = None,
    reporter: Reporter | None = None,
    **choices: Any,
) -> Bundle:
    """Compile `model` for `target` and write the bundle folder `out`; returns it opened.

    tsw: timestep bins: a number, "auto" or "all". recipe: a name or a TOML file. force: replace a bundle at `out`.
    strict: fail when a pass skipped a planned edit. choices: what make_plan() takes. Raises VdqError subclasses.
    """
    reporter = reporter or Reporter()
    with BundleWriter(out, force=force) as writer:  # first: a taken folder is refused before the hours of work
        planned = make_plan(model, target=target, tsw=tsw, recipe=recipe, dump=dump, reporter=reporter, **choices)
        return finish(planned, writer, strict=strict, dump=dump, reporter=reporter)


def make_plan(
    model: Model | str,
    *,
    target: str,
    tsw: int | str,
    recipe: str,
    isa: str | None = None,
    optimal_bins: bool = False,
    calibration: Path | None = None,
    save_calibration: Path | None = None,
    traced: Graph | None = None,
    dump: Dump | None = None,
    reporter: Reporter | None = None,
) -> Planned:
    """Everything that looks at data. calibration: reuse a saved record instead of running the model; traced: its graph,
    if there is one already (it is edited)."""
    reporter = reporter or Reporter()
    spec, chosen, count = targets.load(target).spec(isa), recipes.load(recipe), _bin_count(tsw)  # cheap refusals first
    if calibration is not None and not calibration.is_file():
        raise CalibrationError(f"no calibration record at {calibration}", hint="--save-calibration writes one")
    model = sources.resolve(model)
    with reporter.stage("trace"):
        graph = traced or trace(model)
    reports = pipeline.run_passes(graph, pipeline.CANONICAL, PassContext(spec=spec), dump=dump)
    record = _record(graph, model, calibration, reporter)
    if save_calibration:
        record.save(save_calibration)
    with reporter.stage("solve") as advance:
        plan = solve(graph, record, chosen, spec, tsw=count, optimal_bins=optimal_bins, progress=advance)
    plan = settle(graph, plan)  # a producer that takes a reader's smoothing keeps its integers, its scales follow
    return Planned(model, spec, graph, plan, reports)


def finish(
    planned: Planned,
    writer: BundleWriter,
    *,
    strict: bool = False,
    dump: Dump | None = None,
    reporter: Reporter | None = None,
) -> Bundle:
    """From plan to bundle: quantize every bin's graph into `writer` and commit it. Raises PassError with `strict`."""
    reporter = reporter or Reporter()
    reports, paths = quantize(planned, writer, dump=dump, reporter=reporter)
    _tell(planned.reports + reports, strict, reporter)
    schedule = Schedule.from_bins(planned.plan.bins, paths, sampler=_sampler_settings(planned.model))
    return writer.commit(_manifest(planned), schedule, planned.plan)


def quantize(
    planned: Planned, writer: BundleWriter, *, dump: Dump | None, reporter: Reporter
) -> tuple[list[PassReport], list[str]]:
    """Carry the plan out: bin-independent passes once, then one graph a bin into the bundle.

    Returns what the passes did (of the bins, which are alike, the first) and the bundle path of each bin's graph.
    """
    own = tuple(targets.load(planned.spec.name).PASSES)
    shared = planned.graph.copy()
    reports = pipeline.run_passes(shared, pipeline.SHARED, PassContext(planned.plan, None, planned.spec), dump=dump)
    paths = []
    with reporter.stage("quantize") as advance:
        for one in planned.plan.bins:
            graph = shared.copy()
            context = PassContext(planned.plan, one, planned.spec)
            made = pipeline.run_passes(graph, (*pipeline.PER_BIN, *own), context, dump=dump if one.index == 0 else None)
            if one.index == 0:
                reports += made
            paths.append(writer.add_graph(f"body.{one.name}", *graph.skeleton()))
            advance(one.index + 1, len(planned.plan.bins))
    return reports, paths


def _bin_count(tsw: int | str) -> Tsw:
    count: Any = tsw
    if isinstance(tsw, str) and tsw.removeprefix("-").isdecimal():
        count = int(tsw)
    check_count(count)
    chosen: Tsw = count
    return chosen


def _record(graph: Graph, model: Model, saved: Path | None, reporter: Reporter) -> CalibrationRecord:
    if saved is not None:
        return CalibrationRecord.load(saved)  # solve() checks whose it is
    with reporter.stage("calibrate") as advance:
        return observe(graph, model, progress=advance)


def _tell(reports: list[PassReport], strict: bool, reporter: Reporter) -> None:
    """Print what each pass did; with `strict` a skipped edit is an error."""
    for report in reports:
        reporter.note(f"{report.name}: {report.applied} applied, {len(report.skipped)} skipped")
        for skip in report.skipped:
            reporter.note(f"  skipped {skip.where}: {skip.why}")
    skipped = [(r.name, s) for r in reports for s in r.skipped]
    if strict and skipped:
        name, first = skipped[0]
        raise PassError(f"--strict: {len(skipped)} edits skipped, first by {name} at {first.where}: {first.why}")


def _sampler_settings(model: Model) -> dict[str, Any]:
    return {} if model.sampler is None else dict(model.sampler.settings())


def _manifest(planned: Planned) -> Manifest:
    model, graph = planned.model, planned.graph
    return Manifest(
        model=ModelIdentity(name=model.name, weight_hash=graph.source, config=model.metadata.get("config", {})),
        target=planned.spec.name,
        isa=planned.spec.isa,
        signature=signature_of(graph.skeleton()[0], model.timestep_input),
        recipe=planned.plan.recipe,
        session=targets.load(planned.spec.name).session_options(planned.spec),
        providers=planned.spec.providers,
    )
