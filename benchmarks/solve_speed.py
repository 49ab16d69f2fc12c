"""Time to solve the ten linears of one Wan-1.3B-shaped block with recipe wan22-w4a4 and six bins, and where it goes.

Width 1536, FFN 8960: q, k, v and o of two attentions (the cross-attention's k and v read the text, here as wide as the
rest), FFN up and down. Weights and activations are random; activations have correlated channels, one in a hundred of
them 20 times as large, and grow from step to step. Solving starts from the float graph and a calibration record: the
numbers chosen are those of a real export, only the model is not run.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import statistics
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from benchmarks import common
from benchmarks.memory import Peak
from vdq_export import pipeline, targets
from vdq_export import recipe as recipes
from vdq_export.calib import group
from vdq_export.calib import solve as solving
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.calib.solve import TOKENS, Solved
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph
from vdq_export.work.engine import Local

RECIPE, TARGET, BINS, LIMIT = "wan22-w4a4", "reference", 6, 90.0
STEPS, ROWS, TOP = 36, 64, 4
# Function -> what it stands for; of nested ones the outer stands for the rest of it.
PARTS = {
    ("solve.py", "_task"): "sampled rows, ranges, weights read",
    ("low_rank.py", "split"): "low-rank split",
    ("group.py", "_nearest"): "group scales, rounding to nearest",
    ("clip.py", "search"): "clip ratios of 6 bins",
    ("gptq.py", "factorise"): "GPTQ: Cholesky",
    ("group.py", "_evidence"): "GPTQ: quantized rows, Hessian",
    ("gptq.py", "gptq"): "GPTQ: rounding",
    ("group.py", "_by_gptq"): "GPTQ: held-out check",
}
NESTED = {("gptq.py", "factorise"): ("group.py", "_evidence"), ("gptq.py", "gptq"): ("group.py", "_by_gptq")}


@dataclass(frozen=True)
class Shape:
    width: int = 1536
    ffn: int = 8960

    @property
    def layers(self) -> dict[str, tuple[str, int, int]]:
        """{linear: (value it reads, K, N)}"""
        square, w, f = (self.width, self.width), self.width, self.ffn
        found = {f"attn1.to_{name}": ("norm1", *square) for name in "qkv"}
        found |= {"attn1.to_out": ("attn1", *square), "attn2.to_q": ("norm2", *square)}
        found |= {f"attn2.to_{name}": ("text", *square) for name in "kv"}
        return found | {"attn2.to_out": ("attn2", *square), "ffn.up": ("norm3", w, f), "ffn.down": ("gelu", f, w)}


SHAPES = {False: Shape(), True: Shape(64, 160)}


def run(arguments: argparse.Namespace) -> None:
    settings = {"small": arguments.small, "workers": arguments.threads}
    runs = [common.in_child("solve_speed", "timed", settings, arguments.threads) for _ in range(arguments.rounds)]
    profile = common.in_child("solve_speed", "profile", settings, 1)
    report(arguments, runs, profile)


def timed(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: seconds of each stage with `workers` processes, and the peak memory of this one."""
    network = made(SHAPES[settings["small"]])
    with Peak() as peak:
        _, seconds = solved(network, settings["workers"])
    return {"seconds": seconds, **peak.as_dict()}


def profile(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: CPU seconds of each part, all in this process, which has one thread."""
    solving.solve_groups = lambda tasks, *_: map(group.solve_group, tasks)  # type: ignore[assignment]
    network = made(SHAPES[settings["small"]])
    with cProfile.Profile(time.process_time) as profiler:
        start = time.process_time()
        found, _ = solved(network, 1)
        inside = time.process_time() - start
    cumulative = {
        (file.rpartition("/")[2], name): entry[3]
        for (file, _, name), entry in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
    }
    parts = {where: cumulative.get(where, 0.0) for where in PARTS}
    for inner, outer in NESTED.items():
        parts[outer] -= parts[inner]
    layers = {
        layer.name: {
            "codes_by_gptq": layer.weight.codes,
            "why": layer.weight.why,
            "low_rank_error": None if layer.low_rank is None else layer.low_rank.error,
        }
        for layer in found.plan.layers
        if layer.weight is not None
    }
    return {"seconds": inside, "parts": {PARTS[where]: value for where, value in parts.items()}, "layers": layers}


def solved(network: Network, workers: int) -> tuple[Solved, dict[str, float]]:
    start = time.perf_counter()
    (one,) = draft(network, tsw=BINS)
    drafted = time.perf_counter()
    floated = network.graph.copy()
    pipeline.run_passes(floated, pipeline.FLOAT, PassContext(one, None, network.spec))
    passed = time.perf_counter()
    found = solving.solve(one, floated, network.record, network.spec, engine=Local(workers))
    done = time.perf_counter()
    assert len(found.plan.bins) == BINS and all(layer.quantized for layer in found.plan.layers)
    return found, {
        "smoothing and bins": drafted - start,
        "float passes": passed - drafted,
        "solve": done - passed,
        "all": done - start,
    }


def made(shape: Shape) -> Network:
    graph = block(shape)
    slots = tuple(Slot(float(t), branch) for t in np.linspace(1000, 20, STEPS) for branch in ("cond", "uncond"))
    values = {}
    for index, (value, k) in enumerate({value: k for value, k, _ in shape.layers.values()}.items()):
        readers = tuple(name for name, (read, *_) in shape.layers.items() if read == value)
        values[value] = recorded(value, readers, activations(len(slots), k, index))
    record = CalibrationRecord("block", "m" * 64, graph.hash(), slots, values, len(slots))
    # Nothing follows any of these linears: a rule for the last layer would have them all.
    recipe = msgspec.structs.replace(recipes.load(RECIPE), keep_float=())
    return Network(graph, record, recipe, targets.load(TARGET).spec(None))


def block(shape: Shape) -> Graph:
    """The ten linears, each value a graph input: what lies between them costs solving nothing."""
    random, arrays, nodes = np.random.default_rng(0), dict[str, Array](), []
    for name, (value, k, n) in shape.layers.items():
        weight = random.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
        arrays[f"{name}.weight"] = weight.T  # a view of output-channel-major storage, as traced models have them
        arrays[f"{name}.bias"] = random.standard_normal(n, np.float32)
        nodes.append(helper.make_node("MatMul", [value, f"{name}.weight"], [f"{name}/MatMul"], name=f"{name}/MatMul"))
        nodes.append(helper.make_node("Add", [f"{name}/MatMul", f"{name}.bias"], [f"{name}/Add"], name=f"{name}/Add"))
    inputs = {value: k for value, k, _ in shape.layers.values()}
    outputs = {f"{name}/Add": n for name, (_, _, n) in shape.layers.items()}
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 512, width]) for name, width in side.items()]
        for side in (inputs, outputs)
    ]
    empty = [TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT) for name, array in arrays.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "block", *ends, empty), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    for tensor in proto.graph.initializer:
        tensor.raw_data = bytes(4 * int(np.prod(tensor.dims)))
    return Graph.from_proto(onnx.shape_inference.infer_shapes(proto), arrays, source="random weights")


def activations(slots: int, k: int, seed: int) -> Array:
    """[S, n, K]"""
    random = np.random.default_rng([seed, k])
    hidden = random.standard_normal((slots, ROWS + TOP, 64), np.float32)
    rows = hidden @ (random.standard_normal((64, k), np.float32) / np.float32(8))
    rows += random.standard_normal(rows.shape, np.float32)
    channels = np.exp(random.normal(0, 0.5, k)) * np.where(random.random(k) < 0.01, 20, 1)
    rows *= channels.astype(np.float32)
    rows *= np.linspace(1, 3, slots, dtype=np.float32)[:, None, None]
    return rows


def recorded(name: str, readers: tuple[str, ...], rows: Array) -> ValueRecord:
    largest = np.argsort(-np.square(rows).sum(axis=2), axis=1, kind="stable")[:, :TOP, None]
    lo, hi = rows.min(axis=1), rows.max(axis=1)
    top = np.take_along_axis(rows, largest, axis=1)
    count = np.full(len(rows), rows.shape[1])
    return ValueRecord(name, "linear", readers, lo, hi, count, np.maximum(hi, -lo), rows[:, :ROWS], top)


def report(arguments: argparse.Namespace, runs: list[dict[str, Any]], profile: dict[str, Any]) -> None:
    shape, workers = SHAPES[arguments.small], arguments.threads
    stages = {name: statistics.median(one["seconds"][name] for one in runs) for name in runs[0]["seconds"]}
    rows = [[name, f"{seconds:.1f}"] for name, seconds in stages.items()]
    inside = profile["seconds"]
    parts = [[name, f"{value:.1f}", f"{value / inside:.0%}"] for name, value in profile["parts"].items()]
    rest = inside - sum(profile["parts"].values())
    parts += [["rest", f"{rest:.1f}", f"{rest / inside:.0%}"], ["all", f"{inside:.1f}", "100%"]]
    values = {value for value, *_ in shape.layers.values()}
    by_gptq = sum(one["codes_by_gptq"] for one in profile["layers"].values())
    notes = (
        f"Width {shape.width}, FFN {shape.ffn}, {len(shape.layers)} linears of {len(values)} values, {BINS} bins of "
        f"{TOKENS // BINS} sampled rows. Medians of {arguments.rounds} runs, load average before the first "
        f"{arguments.load:.1f}. Limit for all stages together: {LIMIT:g} s. GPTQ's integers were taken for "
        f"{by_gptq} of {len(profile['layers'])} linears, which its held-out rows decided."
    )
    tables = [
        (f"{workers} processes of one thread", ["stage", "seconds"], rows),
        ("In one process of one thread", ["part", "CPU seconds", "share"], parts),
    ]
    data = {"workers": workers, "load": arguments.load, "stages": stages, "runs": runs, "profile": profile}
    title = f"Time to solve one block with {RECIPE}"
    common.write("solve_speed", title, tables, data, notes, small=arguments.small)
    if stages["all"] > LIMIT:
        raise SystemExit(f"{stages['all']:.0f} s, more than {LIMIT:g} s")


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="runs of which the median counts (default 3)")
    made.set_defaults(load=os.getloadavg()[0])
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"timed": timed, "profile": profile})
