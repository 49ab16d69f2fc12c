"""export(): the whole compiler on one screen. Model -> graph -> record -> plan -> one graph a bin -> bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from vdq_export import pipeline, recipe_rules, sources, targets
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.calib import blocks, float_bins, learned
from vdq_export.calib.attention import plan_attentions
from vdq_export.calib.bins import Tsw, check_count
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.solve import Solved, at_precision, solve
from vdq_export.calib.step_reuse import learn
from vdq_export.calib.values import observe_values, plan_values, ruled
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import CalibrationError, RecipeError
from vdq_export.graph import Graph, is_promise
from vdq_export.handoff import files as hand_off
from vdq_export.hoisting import parts as hoisting_parts
from vdq_export.hoisting import split as hoisting
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.model import Model
from vdq_export.plan import QuantPlan
from vdq_export.planned import Part, Planned
from vdq_export.policy import CachePolicy, Probe
from vdq_export.progress import Reporter, piece
from vdq_export.recipe import Recipe
from vdq_export.report import parts as report_parts
from vdq_export.report import ranges
from vdq_export.report.networks import network_name
from vdq_export.report.passes import tell
from vdq_export.schedule import Schedule
from vdq_export.target_spec import TargetSpec
from vdq_export.trace import trace
from vdq_export.weights.number_grid import numpy_type
from vdq_export.work.engine import Engine, Local
from vdq_export.work.place import Work, at_work
from vdq_export.work.store import WorkStore

Dump = Callable[[str, Graph], None]


@dataclass(frozen=True)
class _Settings:
    """What make_plan() was asked for, checked."""

    spec: TargetSpec
    recipe: Recipe
    tsw: Tsw | None  # None: the recipe's
    optimal_bins: bool = False
    hoist: bool = True
    by_blocks: bool | None = None
    calibration: Path | None = None
    save_calibration: Path | None = None
    workers: int = os.cpu_count() or 1
    work: Work | None = None
    traced: Mapping[str, Graph] = field(default_factory=dict)
    dump: Dump | None = None
    strict: bool = False
    reporter: Reporter = field(default_factory=Reporter)

    @property
    def engine(self) -> Engine:
        return Local(self.workers) if self.work is None else self.work.engine

    @property
    def store(self) -> WorkStore | None:
        return None if self.work is None else self.work.store


def export(
    model: Model | str = sources.DEFAULT,
    *,
    target: str = "ort-int8",
    tsw: int | str | None = None,
    recipe: str | Recipe = "static-asq",
    out: str | Path = "bundle",
    force: bool = False,
    strict: bool = False,
    dump: Dump | None = None,
    reporter: Reporter | None = None,
    work: Work | str | Path | None = None,
    engine: str = "local",
    page: bool = True,
    **choices: Any,
) -> Bundle:
    """Compile `model` for `target` and write the bundle folder `out`; returns it opened.

    tsw: timestep bins: a number, "auto" or "all"; by default the recipe's. recipe: a name, a TOML file, or a Recipe.
    force: replace a bundle at `out`. strict: fail when a pass skipped a planned edit. work: folder of
    finished work, by default "OUT.work" until the bundle is there: an export that was cut short goes on from it.
    engine: "local", "ray" or "ray://HOST:PORT". page: write report/report.html. reporter: who is told of progress and
    warnings; None: nobody. choices: isa, activations, calibration, hoist …, see make_plan().
    Raises BundleError for an `out` that is taken or cannot be written, UnknownNameError for names that nobody has,
    RecipeError, ModelError, TraceError, CalibrationError; StrictError with `strict`.
    """
    reporter = reporter or Reporter()
    place = at_work(out, work=work, engine=engine, workers=choices.get("workers"))
    with BundleWriter(out, force=force) as writer, place as settled:  # a taken folder is refused before hours of work
        choices |= {"dump": dump, "reporter": reporter, "work": settled, "strict": strict}
        planned = make_plan(model, target=target, tsw=tsw, recipe=recipe, **choices)
        if settled.store is not None and settled.store.hits:
            reporter.warn(f"{settled.store.hits} results of finished work were taken from {settled.store.folder}")
        return finish(planned, writer, strict=strict, dump=dump, reporter=reporter, page=page)


def make_plan(
    model: Model | str,
    *,
    target: str,
    recipe: str | Recipe,
    tsw: int | str | None = None,
    isa: str | None = None,
    activations: int | Literal["mixed"] | None = None,
    **choices: Any,
) -> Planned:
    """Trace `model`, calibrate, solve: all that looks at data; finish() then writes it. Raises as export() does.

    recipe, tsw: as export() takes them. isa: what exactly of the target ("avx2", "v75", "fp16"); None: its own choice.
    activations: their bits, by default the target's, or the recipe's where the target has none of its own; "mixed":
    8 in linears and 16 between them, on targets that leave no operator in float.
    choices: optimal_bins; hoist: let what no step changes leave the graphs (docs/hoisting.md); by_blocks: calibrate
    one segment of the network at a time, by default where its weights do not fit in memory; calibration: a saved
    record to use instead of running the model; save_calibration; workers: processes that solve layers; work: an
    engine and a store of finished work instead; traced: {expert, "" for the only network: its graph} if there are any
    already (they are edited); dump; reporter; strict: a rule of the recipe that matches no layer is an error.
    """
    chosen = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    count = None if tsw is None else _bin_count(tsw)
    spec = targets.load(target).spec(isa)
    chosen = _with_activations(chosen, activations or spec.default_activations, spec)
    settings = _Settings(spec, chosen, count, **choices)  # cheap refusals first
    model = sources.resolve(model)
    for text in model.metadata.get("notes", ()):
        settings.reporter.warn(text)
    recipe_rules.check_experts(chosen, model.name, [expert for expert, _ in model.networks()])
    for expert, _ in model.networks():
        place = record_path(settings.calibration, expert)
        if place is not None and not place.is_file():
            raise CalibrationError(f"no calibration record at {place}", hint="--save-calibration writes one")
    parts: list[Part] = []
    reports: list[PassReport] = []
    for expert, network in model.networks():
        first = sum(len(plan.bins) for part in parts for plan in part.plans)
        made, told = _plan_network(expert, network, model.limits(expert), settings, first)
        parts += made
        reports += told
    float_bins.check(plan for part in parts for plan in part.plans)
    return Planned(model, settings.spec, chosen, tuple(parts), reports)


def finish(
    planned: Planned,
    writer: BundleWriter,
    *,
    strict: bool = False,
    dump: Dump | None = None,
    reporter: Reporter | None = None,
    page: bool = False,
) -> Bundle:
    """From plan to bundle: quantize every bin's graph into `writer` and commit it. Raises StrictError with `strict`."""
    reporter = reporter or Reporter()
    reports, graphs = quantize(planned, writer, dump=dump, reporter=reporter)
    hoisted, told = hoisting_parts.write(planned, writer, reporter)
    reports = planned.reports + reports + told
    tell(reports, strict, reporter)
    report_parts.write(planned, reports, writer)
    if planned.spec.hand_off:
        hand_off.write(writer, graphs, planned.spec, strict=strict, reporter=reporter)
    if (extra := _own_weights(planned)) > 0:
        reporter.note(f"bins with weights of their own: {extra / 1e6:.1f} MB more than one set of weights")
    schedule = Schedule.from_plans(
        planned.plans,
        list(graphs),
        sampler={} if planned.model.sampler is None else dict(planned.model.sampler.settings()),
        reuse=_reuse(planned, writer),
        hoisted=hoisted,
    )
    describe = report_parts.describe if page else None
    with reporter.stage("write"):
        return writer.commit(_manifest(planned), schedule, planned.plans, describe=describe)


def quantize(
    planned: Planned, writer: BundleWriter, *, dump: Dump | None, reporter: Reporter
) -> tuple[list[PassReport], dict[str, Graph]]:
    """Carry the plans out: bin-independent passes once a part, then one graph a bin into the bundle.

    Returns what the passes did (to bins of a plan that are alike, the first) and {bundle path: graph}, bin by bin.
    """
    own = tuple(targets.load(planned.spec.name).PASSES)
    reports, graphs = list[PassReport](), dict[int, tuple[str, Graph]]()
    total = sum(len(plan.bins) for plan in planned.plans)
    with reporter.stage("quantize") as advance:
        for part in planned.parts:
            shared = dict[frozenset[str], Graph]()  # by the layers in float: bins may differ in them
            for plan in part.plans:
                known = list[list[PassReport]]()
                for one in plan.bins:
                    mine, is_first = plan.of_bin(one), not shared
                    name = f"{plan.name}.{one.name}".strip(".")
                    floating = frozenset(layer.name for layer in mine.layers if not layer.quantized)
                    if floating not in shared:
                        context = PassContext(mine, None, planned.spec, part.tensors)
                        told = _with_integers(part, context, shared, floating, dump if is_first else None)
                        reports += pipeline.of_network(name, told)
                    graph = shared[floating].copy()
                    context = PassContext(mine, one, planned.spec, part.tensors)
                    order = (*pipeline.PER_BIN, *own)
                    made = pipeline.run_passes(graph, order, context, dump=dump if is_first else None)
                    if made not in known:
                        known.append(made)
                        reports += pipeline.of_network(name, made)
                    graphs[one.index] = writer.add_graph(f"body.{one.name}", *graph.skeleton()), graph
                    advance(len(graphs), total)
    return reports, dict(graphs[index] for index in sorted(graphs))


def _with_integers(
    part: Part, context: PassContext, known: dict[frozenset[str], Graph], floating: frozenset[str], dump: Dump | None
) -> list[PassReport]:
    """Add to `known` the part's graph with the passes run that its bins share, which leave `floating` alone.

    What graphs of other bins promise too is the same promise: computed once, wherever it is written.
    """
    graph = part.graph.copy()
    told = pipeline.run_passes(graph, pipeline.SHARED, context, dump=dump)
    promised = {x.name: x._values for one in known.values() for x in one.constants() if is_promise(x)}
    for constant in graph.constants():
        if constant.name in promised and is_promise(constant):
            constant.values = promised[constant.name]
    known[floating] = graph
    return told


def _plan_network(
    expert: str, model: Model, limits: tuple[float | None, float | None], settings: _Settings, first: int
) -> tuple[list[Part], list[PassReport]]:
    """The parts of one network: as many as it gets sets of weights. first: number of its first bin."""
    spec, dump, reporter = settings.spec, settings.dump, settings.reporter
    recipe = settings.recipe.of_expert(expert) if expert else settings.recipe
    with reporter.stage(f"trace {expert}".strip()):
        graph = settings.traced[expert] if expert in settings.traced else trace(model)
    told = pipeline.run_passes(graph, pipeline.canonical(spec.name), PassContext(spec=spec), dump=dump)
    reports = pipeline.of_network(expert, told)
    if expert not in settings.traced:  # else a search that plans many times says it many times
        recipe_rules.check_matches(recipe, ruled(graph, spec), reporter, strict=settings.strict)
    recipe = learned.adapted(recipe, model.learned)
    record = _record(graph, model, expert, recipe, settings)
    probe = None if recipe.schedule.cache is None else learn(graph, model, store=settings.store)
    constant = record.constant_inputs if model.prompt_inputs is None else model.prompt_inputs
    roles = hoisting.roles(model.example_inputs, model.timestep_input, constant)
    layers = hoisting.layers(graph, roles) if settings.hoist else {}
    network = Network(graph, record, recipe, spec, expert, limits, layers)
    signature = signature_of(graph.skeleton()[0], model.timestep_input, bare=graph.bare, arguments=model.arguments())
    parts = []
    with reporter.stage(f"solve {expert}".strip()) as advance:
        bins = recipe.tsw if settings.tsw is None else settings.tsw
        drafts = draft(network, tsw=bins, optimal_bins=settings.optimal_bins, first=first)
        count = sum(len(one.bins) for one in drafts)
        for number, one in enumerate(drafts):
            floated = graph.copy()
            told = pipeline.run_passes(floated, pipeline.FLOAT, PassContext(one, None, spec), dump=dump)
            reports += pipeline.of_network(network_name(one, drafts), told)
            done = piece(advance, number, len(drafts))
            solved = solve(one, floated, record, spec, engine=settings.engine, store=settings.store, progress=done)
            solved = learned.carry(solved, floated, model.learned, spec)
            hoisted = hoisting.split(floated, roles, layers) if settings.hoist else None
            body = floated if hoisted is None else hoisted.body
            plans = _precisions(solved, record, spec, count)
            plans = tuple(float_bins.mark(plan_attentions(plan, body, record)) for plan in plans)
            if spec.every_operator:
                plans = _plan_values(plans, floated, body, model, solved, settings)
            seen = ranges.measure(record, plans[0])
            parts.append(Part(body, plans, solved.tensors, signature, hoisted, probe, seen))
    return parts, reports


def _plan_values(
    plans: tuple[QuantPlan, ...], floated: Graph, body: Graph, model: Model, solved: Solved, settings: _Settings
) -> tuple[QuantPlan, ...]:
    """The plans with ranges of every value of `body`, observed where quantization will find it: behind the low-rank
    branches. The whole graph `floated` runs, for it takes the inputs there are."""
    context = PassContext(plans[0].of_bins(), None, settings.spec, solved.tensors)
    whole, graph = floated.copy(), body.copy()
    for one in (whole, graph):
        pipeline.run_passes(one, ("low_rank",), context)
    with settings.reporter.stage("observe values") as advance:
        extremes = observe_values(whole, model, progress=advance, store=settings.store)
    return tuple(plan_values(plan, graph, extremes, settings.spec) for plan in plans)


def _precisions(solved: Solved, record: CalibrationRecord, spec: TargetSpec, count: int) -> tuple[QuantPlan, ...]:
    """The plan itself, or, under a delta schedule, it as the low precision and the high one, `count` bins further."""
    plan, wanted = solved.plan, solved.plan.recipe.schedule
    if wanted.delta is None:
        return (plan,)
    high = at_precision(plan, record, spec, wanted.high, first=plan.bins[0].index + count)
    return msgspec.structs.replace(plan, precision="low"), high


def _with_activations(recipe: Recipe, wanted: int | Literal["mixed"], spec: TargetSpec) -> Recipe:
    """`recipe` with activations of so many bits; 0: its own. Raises RecipeError for a mix where nothing is between."""
    if wanted == "mixed" and not spec.every_operator:
        raise RecipeError(
            f"mixed activations are for targets that quantize every operator; {spec.name} runs the others in float",
            hint="say a number of bits",
        )
    bits, between = (8, 16) if wanted == "mixed" else (wanted, 0)
    if not bits or (bits, between) == (recipe.activations.bits, recipe.activations.between):
        return recipe
    activations: Any = msgspec.structs.replace(recipe.activations, bits=bits, between=between)
    return msgspec.structs.replace(recipe, activations=activations)


def _bin_count(tsw: int | str) -> Tsw:
    count: Any = tsw
    if isinstance(tsw, str) and tsw.removeprefix("-").isdecimal():
        count = int(tsw)
    check_count(count)
    chosen: Tsw = count
    return chosen


def _record(graph: Graph, model: Model, expert: str, recipe: Recipe, settings: _Settings) -> CalibrationRecord:
    """Saved or made now; with experts each has a file of its own, "NAME.EXPERT.safetensors"."""
    saved = record_path(settings.calibration, expert)
    if saved is not None:
        return CalibrationRecord.load(saved)  # draft() checks whose it is
    if not recipe.needs_data:
        return CalibrationRecord.empty(graph, model)
    with settings.reporter.stage(f"calibrate {expert}".strip()) as advance:
        if blocks.is_too_large(graph) if settings.by_blocks is None else settings.by_blocks:
            record = blocks.calibrate(graph, model, settings.store, progress=advance)
        else:
            record = observe(graph, model, progress=advance, engine=settings.engine, store=settings.store)
    if (place := record_path(settings.save_calibration, expert)) is not None:
        record.save(place)
    return record


def record_path(path: Path | None, expert: str) -> Path | None:
    """The calibration record of one expert, given the name for all of them."""
    return path if path is None or not expert else path.with_suffix(f".{expert}{path.suffix}")


def _reuse(planned: Planned, writer: BundleWriter) -> CachePolicy | None:
    """Step reuse as the recipe wants it, its probe graphs written; None where it wants none."""
    threshold = planned.recipe.schedule.cache
    if threshold is None:
        return None
    learnt = {part.plans[0].expert: part.probe for part in planned.parts if part.probe is not None}
    probes = []
    for expert, one in learnt.items():
        path = writer.add_graph(f"probe.{expert}" if expert else "probe", *one.graph.skeleton())
        probes.append(Probe(graph=path, expert=expert, coefficients=one.coefficients))
    return CachePolicy(threshold=threshold, probes=tuple(probes))


def _own_weights(planned: Planned) -> int:
    """Bytes that the quantized weights of bins beyond one set a network take."""
    seen, extra = set[str](), 0
    for plan in (part.plans[0] for part in planned.parts):
        if plan.expert in seen:
            layers = (x for x in plan.layers if x.weight is not None)
            extra += sum(x.shape[0] * x.shape[1] * numpy_type(x.weight.dtype).itemsize for x in layers if x.weight)
        seen.add(plan.expert)
    return extra


def _manifest(planned: Planned) -> Manifest:
    model, spec = planned.model, planned.spec
    return Manifest(
        model=ModelIdentity(
            name=model.name,
            weight_hash=model.weight_hash() if model.experts else planned.parts[0].graph.source,
            config=model.metadata.get("config", {}),
        ),
        target=spec.name,
        isa=spec.isa,
        signature=planned.signature,
        recipe=planned.recipe,
        session=targets.load(spec.name).session_options(spec),
        providers=spec.providers,
    )
