"""The parts that left the bins' graphs, as files of a bundle: graphs with 8-bit weights, tables, and what that saves.

The host runs them: prompt.onnx once a video and guidance branch, mixed.onnx once a step before the body; tables hold
what step.onnx gives at the calibrated timesteps, from its float weights. step.onnx itself is for other timesteps.
"""

from __future__ import annotations

import msgspec
from safetensors.numpy import save_file

from vdq_export import pipeline
from vdq_export.bundle_writer import BundleWriter
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph
from vdq_export.hoisting import split as hoisting
from vdq_export.plan import HoistedPart
from vdq_export.planned import Part, Planned
from vdq_export.progress import Reporter
from vdq_export.report.hoisting import HOISTING, HoistingReport, NetworkReport, Work
from vdq_export.report.networks import network_name
from vdq_export.schedule import Hoisted
from vdq_export.weights import order as weight_order


def write(planned: Planned, writer: BundleWriter, reporter: Reporter) -> tuple[tuple[Hoisted, ...], list[PassReport]]:
    """Write the parts of every set of weights and the report of them, which is told.

    Returns the schedule's entries and what the passes did.
    """
    entries, networks, passes = list[Hoisted](), list[NetworkReport](), list[PassReport]()
    chosen = [part for part in planned.parts if part.hoisted is not None and part.hoisted.ahead()]
    if not chosen:
        return (), []
    with reporter.stage("hoist") as advance:
        for part in chosen:
            assert part.hoisted is not None
            name = network_name(part.plans[0], planned.plans)
            entries.append(_write(part, name, writer, passes))
            networks.append(_report(part.hoisted, name))
            reporter.note(networks[-1].in_words())
            advance(len(networks), len(chosen))
    writer.add_file(HOISTING, HoistingReport(networks=tuple(networks)).to_json())
    return tuple(entries), passes


def _write(part: Part, name: str, writer: BundleWriter, passes: list[PassReport]) -> Hoisted:
    assert part.hoisted is not None
    paths = dict[HoistedPart, str]()
    for kind, graph in part.hoisted.ahead().items():
        quantized, told = _quantized(graph, part)
        passes += pipeline.of_network(f"{kind}.{name}".strip("."), told)
        paths[kind] = writer.add_graph(f"{kind}.{name}" if name else kind, *quantized.skeleton())
    timesteps = tuple(sorted({t for plan in part.plans for one in plan.bins for t in one.steps}, reverse=True))
    tables = ""
    if part.hoisted.step is not None and timesteps:
        tables = f"tables/{name or 'steps'}.safetensors"
        save_file(hoisting.tables(part.hoisted.step, timesteps), writer.file(tables))
    return Hoisted(
        bins=tuple(sorted(one.index for plan in part.plans for one in plan.bins)),
        prompt=paths.get("prompt", ""),
        step=paths.get("step", ""),
        mixed=paths.get("mixed", ""),
        tables=tables,
        timesteps=timesteps if tables else (),
    )


def _quantized(graph: Graph, part: Part) -> tuple[Graph, list[PassReport]]:
    """Weights of the planned linears as 8-bit integers. Without a target: onnxruntime on the host runs this graph."""
    quantized, plan = graph.copy(), part.plans[0]
    here = {linear.name for linear in quantized.linears()}
    mine = msgspec.structs.replace(plan, layers=tuple(one for one in plan.layers if one.name in here), values=())
    told = pipeline.run_passes(quantized, ("quantize_weights",), PassContext(mine, None, None, part.tensors))
    weight_order.dequantize_late(quantized)
    return quantized, told


def _report(hoisted: hoisting.Hoisted, name: str) -> NetworkReport:
    return NetworkReport(
        name=name,
        whole=_work(hoisted.whole),
        parts={part: _work(hoisting.work(graph)) for part, graph in hoisted.parts().items()},
        values=len(hoisted.crossings),
        value_bytes=sum(one.nbytes for one in hoisted.crossings),
    )


def _work(found: hoisting.Work) -> Work:
    return Work(nodes=found.nodes, weight_bytes=found.weight_bytes, multiply_adds=found.multiply_adds)
