"""Makes benchmarks/cuda/graphs: the fused graphs of large networks, without weights.

`python -m benchmarks.cuda.prepare` needs no GPU. A machine that has one may have nothing to export with, so the graphs
are exported here, on any machine, and kept. Their weights are left out: the benchmark fills them with random numbers
(graphs.py). Networks and videos are true to size; nobody has calibrated them: every activation gets the range of a
normal distribution, every head one scale, so that the kernels do the work that a calibrated bundle would give them.
"""

from __future__ import annotations

import argparse
import lzma
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import common
from benchmarks.cuda.graphs import GRAPHS
from vdq_export import pipeline, recipe, sources
from vdq_export.bundle_writer import BundleWriter
from vdq_export.calib.observe import observed_values
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.compiler import finish, make_plan
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.progress import TerminalReporter
from vdq_export.trace import trace

FOLDER = common.WORK / "cuda"
REACH = 4.0  # standard deviations of a normal activation that its range covers
STEPS = (999.0, 750.0, 500.0, 250.0)
WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
HUNYUAN = {"num_layers": 2, "num_single_layers": 2}  # of 24 heads of 128 channels
HUNYUAN_SMALL = {
    "num_attention_heads": 2, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 128,
    "pooled_projection_dim": 32,
}  # fmt: skip
VIDEO = {"frames": 81, "height": 480, "width": 832}  # 32 760 tokens


def main() -> None:
    """Export each network and keep its program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.prepare", description=main.__doc__)
    parser.add_argument("--only", choices=sorted(NETWORKS), help="One of them.")
    parser.add_argument("--small", action="store_true", help="Small ones, into build/: does it work?")
    chosen = parser.parse_args()
    for name in [chosen.only] if chosen.only else NETWORKS:
        for place in prepare(name, small=chosen.small):
            print(f"{place}: {place.stat().st_size / 1e3:.0f} kB", flush=True)


def prepare(name: str, *, small: bool = False, kinds: Sequence[str] = ()) -> Iterator[Path]:
    """The compressed programs of network `name`, by each recipe of `kinds`, by default all."""
    model = sources.resolve(NETWORKS[name](small))
    graph = trace(model)
    work = FOLDER / ("small" if small else "full") / name
    work.mkdir(parents=True, exist_ok=True)
    observed = graph.copy()
    pipeline.run_passes(observed, pipeline.canonical("cuda"), PassContext())
    record = work / "record.safetensors"
    synthetic(observed, model).save(record)
    del observed
    for kind in kinds or RECIPES:
        reporter = TerminalReporter(1)
        planned = make_plan(
            model, target="cuda", isa="jit", recipe=RECIPES[kind](), tsw=len(STEPS), calibration=record,
            traced={"": graph.copy()}, reporter=reporter,
        )  # fmt: skip
        out = work / f"bundle-{kind}"
        with BundleWriter(out, force=True) as writer:
            finish(planned, writer, reporter=reporter)
        place = (work if small else GRAPHS) / f"{name}.{kind}.onnx.xz"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(lzma.compress((out / "graphs" / "cuda.00.onnx").read_bytes(), preset=9))
        shutil.rmtree(out)
        yield place


def synthetic(graph: Graph, model: Model) -> CalibrationRecord:
    """What calibration would have seen, were all activations normal and alike at all timesteps."""
    random, shapes = np.random.default_rng(0), graph.values()
    slots = tuple(Slot(t, "cond") for t in STEPS)
    found: dict[str, ValueRecord] = {}
    for one in observed_values(graph):
        shape = [int(size) for size in shapes[one.name].shape]
        full = np.full((len(slots), shape[-1]), REACH, np.float32)
        more: Mapping[str, Any] = {}
        if one.kind == "linear":
            rows = random.standard_normal((len(slots), 4, shape[-1]), np.float32)
            more = {"peak": full, "rows": rows, "top": rows[:, :1]}
        elif one.heads:
            sizes = (shape[1], shape[3] if len(one.heads) > 1 else 1)
            more = {"heads": np.full((len(slots), *sizes), REACH, np.float32)}
        count = np.full(len(slots), int(np.prod(shape[:-1])), np.int64)
        found[one.name] = ValueRecord(one.name, one.kind, one.readers, -full, full, count, **more)
    constant = tuple(name for name in model.example_inputs if name.startswith("encoder"))
    return CalibrationRecord(
        model.name, graph.source, graph.hash(), slots, found, len(slots), constant_inputs=constant
    )  # fmt: skip


def _wan(small: bool) -> str:
    from benchmarks import random_wan, scale_wan

    folder = FOLDER / ("small" if small else "full") / "wan-model"
    random_wan.write(folder, scale_wan.SMALL["1.3B"] if small else WAN)
    video = {"frames": 5, "height": 64, "width": 64} if small else VIDEO
    return f"{folder}?" + "&".join(f"{key}={value}" for key, value in video.items())


def _hunyuan(small: bool) -> str:
    """Two dual-stream and two single-stream blocks of HunyuanVideo's width, between its embeddings and projection."""
    from benchmarks import random_wan

    folder = FOLDER / ("small" if small else "full") / "hunyuan-model"
    random_wan.write(folder, HUNYUAN_SMALL if small else HUNYUAN, "HunyuanVideoTransformer3DModel")
    video = {"frames": 5, "height": 64, "width": 64} if small else VIDEO
    return f"{folder}?" + "&".join(f"{key}={value}" for key, value in video.items())


def _w8a8(scores: str, values: str) -> recipe.Recipe:
    """Weights by min/max: the benchmark draws its own."""
    attention: Any = recipe.AttentionRecipe(scores=scores, values=values)  # type: ignore[arg-type]
    return msgspec.structs.replace(recipe.load("static-minmax"), attention=attention)


def _w4a8() -> recipe.Recipe:
    weights: Any = msgspec.structs.replace(recipe.load("static-minmax").weights, bits=4, group=128)
    return msgspec.structs.replace(_w8a8("int8", "fp8"), weights=weights)


NETWORKS = {"wan-1.3b": _wan, "hunyuan-blocks": _hunyuan}
RECIPES = {
    "w8a8": lambda: _w8a8("float", "float"),
    "w8a8-attention": lambda: _w8a8("int8", "fp8"),
    "w4a8-attention": _w4a8,
}


if __name__ == "__main__":
    main()
