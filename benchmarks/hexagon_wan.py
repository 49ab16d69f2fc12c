"""Wan-1.3B on Hexagon: two blocks compiled, emulated and shared between bins; all 30 blocks compiled and cut.

Needs onnxruntime-qnn (Linux x86-64). All 30 blocks take about 15 GB of memory, 10 GB of disk and half an hour; the
emulator needs minutes for one call of two blocks. So --only runs some of the steps: what the others found is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks import common, wan
from benchmarks.memory import Peak
from vdq_export import ort, pipeline, targets
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.calib.observe import observe
from vdq_export.compiler import export, finish, make_plan
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.progress import Reporter
from vdq_export.targets.qnn import hexagon, partition
from vdq_export.targets.qnn.contexts import SOCS, Parts, compile_bundle
from vdq_export.targets.qnn.offline import Job, Task, compile_offline
from vdq_export.trace import trace
from vdq_export.weights.store import WeightStore

ARCH, RECIPE, BINS = "v75", "static-minmax", 4
DEEP = replace(wan.FULL, layers=30, text_tokens=512, clips=1)
DEEP_SMALL = replace(wan.SMALL, layers=4, clips=1)
MIB = 2**20


def run(arguments: argparse.Namespace) -> None:
    """Each step in a process of its own: its peak memory is its own, and the next one starts empty."""
    settings = {"small": arguments.small, "parts": arguments.parts}
    data: dict[str, Any] = {"arch": ARCH, "soc": SOCS[ARCH].name, "recipe": RECIPE}
    for task in TASKS:
        kept = _folder(settings, "steps") / f"{task}.json"
        if not arguments.only or task in arguments.only:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(_step(task, settings, arguments)))
        if kept.exists():
            data[task] = json.loads(kept.read_text())
    report(arguments, data)


def _step(task: str, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    answer = common.in_child("hexagon_wan", task, settings, arguments.threads)
    print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)
    return answer


def _folder(settings: dict[str, Any], name: str) -> Path:
    folder: Path = common.WORK / f"hexagon-{name}-{'small' if settings['small'] else 'full'}"
    return folder


def blocks(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: a bundle of two blocks for qnn, and a held-out call with what the float graph says to it."""
    shape, folder = wan.SMALL if settings["small"] else wan.FULL, _folder(settings, "blocks")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    network = wan.model(replace(shape, clips=4))
    graph = trace(network)
    held_out = wan.Clips(shape, [wan.HELD_OUT_SEED], wan.timesteps()[2:3])  # t of the first bin
    feeds = {name: value.numpy() for name, value in next(iter(held_out))[0]["inputs"].items()}
    (reference,) = ort.run(graph, feeds).values()
    np.savez(folder / "call.npz", reference=reference, **feeds)
    bundle = export(
        network, target="qnn", tsw=BINS, recipe=RECIPE, hoist=False, traced={"": graph}, out=folder / "bundle"
    )
    return {"shape": shape.title, "export_seconds": time.perf_counter() - start, "bundle_bytes": bundle.size}


def one_bin(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: one bin's graph alone, as fast as the compiler is."""
    bundle, folder = Bundle.open(_folder(settings, "blocks") / "bundle"), _folder(settings, "blocks") / "alone"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    task = Task(source=str(bundle.graph_path(0)), context=str(folder / "alone_ctx.onnx"))
    result = compile_offline(Job(arch=ARCH, soc_model=SOCS[ARCH].model, tasks=(task,)), folder)
    (node,) = onnx.load(task.context).graph.node
    return {
        "seconds": result.tasks[0].seconds,
        "cpu_seconds": result.tasks[0].cpu_seconds,
        "nodes": result.tasks[0].nodes,
        "peak_memory_bytes": result.peak_memory_bytes,
        "bytes": sum(path.stat().st_size for path in folder.glob("*.bin")),
        "spill_fill_bytes": next(one.i for one in node.attribute if one.name == "max_size"),
    }


def all_bins(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: all bins into one binary that holds their weights once."""
    bundle = Bundle.open(_folder(settings, "blocks") / "bundle")
    _, made = compile_bundle(bundle, [ARCH], shared=True, force=True)
    (found,) = made.contexts
    return {"seconds": found.seconds, "bytes": found.binary_bytes, "peak_memory_bytes": found.peak_memory_bytes}


def emulate(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: one call of the first bin in the emulator, against onnxruntime's CPU provider and against float."""
    folder = _folder(settings, "blocks")
    path = Bundle.open(folder / "bundle").graph_path(0)
    with np.load(folder / "call.npz") as stored:
        feeds = {name: stored[name] for name in stored.files}
    reference = feeds.pop("reference")
    graph = Graph.load(path)
    (cpu,) = ort.run(graph, feeds, exact=True).values()
    session = hexagon.emulator(path, ARCH)
    start = time.perf_counter()
    (htp,) = session.run(None, feeds)
    return {
        "run_seconds": time.perf_counter() - start,
        "cpu_nodes": len(hexagon.left_over(session)),
        "ort_db": float(sqnr_db(reference, cpu)),
        "htp_db": float(sqnr_db(reference, htp)),
        "htp_against_ort_db": float(sqnr_db(cpu, htp)),
    }


def deep_trace(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: the float graph of all blocks on disk, where later steps map it. Not compared with torch: memory."""
    shape, folder = _deep(settings), _folder(settings, "deep")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with Peak() as peak:
        network = wan.model(shape)
        graph = trace(network, tolerance=math.inf)
        store = WeightStore(folder / "weights.bin", "weights.bin")
        proto, arrays = graph.skeleton()
        store.externalise(proto, arrays)
        store.close()
        (folder / "traced.onnx").write_bytes(proto.SerializeToString())
        (folder / "source").write_text(graph.source)
    return {"seconds": time.perf_counter() - start, **peak.as_dict()}


def deep_export(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: the bundle of all blocks, one bin, ranges from a single call."""
    shape, folder = _deep(settings), _folder(settings, "deep")
    clips = wan.Clips(shape, [wan.CALIBRATION_SEED], wan.timesteps()[10:11])
    example = next(iter(clips))[0]["inputs"]
    model = Model(module=torch.nn.Identity(), example_inputs=example, trajectories=clips, name="wan-1.3b")
    start, record = time.perf_counter(), folder / "record.safetensors"
    with Peak() as peak:
        graph = _traced(folder)
        context = PassContext(spec=targets.load("qnn").spec())
        pipeline.run_passes(graph, pipeline.canonical("qnn"), context)
        # Few sessions with many outputs each: every session runs the whole network.
        observe(graph, model, limit=3 * 2**30).save(record)
        del graph
        with BundleWriter(folder / "bundle") as writer:
            made = {"tsw": 1, "recipe": RECIPE, "hoist": False, "traced": {"": _traced(folder)}, "calibration": record}
            bundle = finish(make_plan(model, target="qnn", **made), writer)
    return {
        "shape": shape.title,
        "seconds": time.perf_counter() - start,
        "bundle_bytes": bundle.size,
        **peak.as_dict(),
    }


def deep_compile(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: all blocks, in as few contexts as the compiler takes."""
    return _compile_deep(settings, "auto")


def deep_cut(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: all blocks in settings["parts"] contexts, cut between blocks."""
    return _compile_deep(settings, settings["parts"])


def _compile_deep(settings: dict[str, Any], parts: Parts) -> dict[str, Any]:
    bundle = Bundle.open(_folder(settings, "deep") / "bundle", verify_hashes=False)
    notes: list[str] = []
    bundle, made = compile_bundle(bundle, [ARCH], shared=False, parts=parts, force=True, reporter=_Notes(notes))
    (found,) = made.contexts
    (graph,) = found.graphs
    whole = onnx.load(bundle.graph_path(0), load_external_data=False)
    scales = partition.boundary_scales(partition.split(whole, found.parts))
    return {
        "shape": _deep(settings).title,
        "parameters": sum(one.numel() for one in _meta(_deep(settings)).parameters()),
        "parts": found.parts,
        "seconds": found.seconds,
        "cpu_seconds": graph.cpu_seconds,
        "nodes": graph.nodes,
        "bytes": [(bundle.path / path).stat().st_size for path in graph.binaries],
        "spill_fill_bytes": list(graph.spill_fill_bytes),
        "peak_memory_bytes": found.peak_memory_bytes,
        "boundaries": list(graph.boundaries),
        "equal_scales": sum(len(set(one)) == 1 for one in scales.values()),
        "refused": notes,
    }


def _meta(shape: wan.Shape) -> torch.nn.Module:
    """The network without its weights."""
    with torch.device("meta"):
        return wan.build(shape)


class _Notes(Reporter):
    """Keeps what the search says of the numbers of parts that did not compile."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def note(self, text: str) -> None:
        self._notes.append(text)


def _deep(settings: dict[str, Any]) -> wan.Shape:
    return DEEP_SMALL if settings["small"] else DEEP


def _traced(folder: Path) -> Graph:
    graph = Graph.load(folder / "traced.onnx")
    graph.source = (folder / "source").read_text()
    return graph


def report(arguments: argparse.Namespace, data: dict[str, Any]) -> None:
    tables: list[common.Table] = []
    if {"blocks", "one_bin", "all_bins", "emulate"} <= data.keys():
        tables += _blocks_tables(data)
    if "deep_compile" in data:
        tables.append(_deep_table(data))
    notes = (
        f"Compiler and emulator: onnxruntime-qnn for {ARCH} ({SOCS[ARCH].name}). Recipe {RECIPE}, 16-bit activations, "
        "8-bit weights per output channel, random weights. Seconds are wall time of the compiler alone; processor "
        "seconds beside them because the machine was not always idle. Spill: what the compiled graph keeps in main "
        "memory because the NPU's own is too small. Shared contexts do not load in the emulator, so the emulated bin "
        "is compiled by itself. The ranges of the 30 blocks come from a single call, and their float graph was not "
        "compared with torch: this shows what compiles, not how well it does."
    )
    common.write("hexagon-wan", "Wan-1.3B on Hexagon", tables, data, notes, small=arguments.small, module="hexagon_wan")


def _blocks_tables(data: dict[str, Any]) -> list[common.Table]:
    alone, together, emulated = data["one_bin"], data["all_bins"], data["emulate"]
    rows = [
        ["compiled", f"{alone['seconds']:.1f} s ({alone['cpu_seconds']:.1f} s of processor)"],
        ["nodes on the HTP, on the CPU", f"{alone['nodes']}, {emulated['cpu_nodes']}"],
        ["context", f"{alone['bytes'] / 1e6:.1f} MB"],
        ["spill", f"{alone['spill_fill_bytes'] / MIB:.1f} MiB"],
        ["peak memory of the compiler", f"{alone['peak_memory_bytes'] / MIB:.0f} MiB"],
        ["emulator, one call", f"{emulated['run_seconds']:.0f} s"],
        ["onnxruntime CPU against float", f"{emulated['ort_db']:.2f} dB"],
        ["emulator against float", f"{emulated['htp_db']:.2f} dB"],
        ["emulator against onnxruntime CPU", f"{emulated['htp_against_ort_db']:.2f} dB"],
    ]
    ratio = together["bytes"] / alone["bytes"]
    shared = [
        ["one bin", f"{alone['bytes'] / 1e6:.1f}", "1.000", f"{alone['seconds']:.1f}"],
        [
            f"{BINS} bins, weights shared",
            f"{together['bytes'] / 1e6:.1f}",
            f"{ratio:.3f}",
            f"{together['seconds']:.1f}",
        ],
    ]
    title = f"Two blocks: {data['blocks']['shape']}"
    return [(title, ["", "value"], rows), ("Sharing weights", ["context", "MB", "× one bin", "s"], shared)]


def _deep_table(data: dict[str, Any]) -> common.Table:
    found = [data[task] for task in ("deep_compile", "deep_cut") if task in data]
    rows = [
        ["contexts", *(f"{one['parts']}" for one in found)],
        ["compiled, s", *(f"{one['seconds']:.0f}" for one in found)],
        ["processor, s", *(f"{one['cpu_seconds']:.0f}" for one in found)],
        ["peak memory of the compiler, MiB", *(f"{one['peak_memory_bytes'] / MIB:.0f}" for one in found)],
        ["nodes, all on the HTP", *(f"{one['nodes']}" for one in found)],
        ["MB", *(" + ".join(f"{size / 1e6:.1f}" for size in one["bytes"]) for one in found)],
        ["spill, MiB", *(" + ".join(f"{size / MIB:.1f}" for size in one["spill_fill_bytes"]) for one in found)],
        ["tensors across the cut", *(f"{len(one['boundaries'])}" for one in found)],
        ["of them with equal scales on both sides", *(f"{one['equal_scales']}" for one in found)],
    ]
    title = f"All blocks: {found[0]['shape']}; {found[0]['parameters'] / 1e9:.3f} B parameters"
    return (title, ["", *("the fewest" if n == 0 else "cut" for n in range(len(found)))], rows)


TASKS = {
    "blocks": blocks,
    "one_bin": one_bin,
    "all_bins": all_bins,
    "emulate": emulate,
    "deep_trace": deep_trace,
    "deep_export": deep_export,
    "deep_compile": deep_compile,
    "deep_cut": deep_cut,
}

if __name__ == "__main__":
    made = common.parser(__doc__)
    made.add_argument("--only", nargs="+", choices=list(TASKS), help="these steps; the others' results are kept")
    made.add_argument("--parts", type=int, default=2, help="contexts of deep_cut")
    common.main(made, run, TASKS)
