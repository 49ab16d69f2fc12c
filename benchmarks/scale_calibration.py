"""`python -m benchmarks.scale_calibration`: calibration segment by segment against the whole graph at once.

Wan2.1-T2V-1.3B at its published configuration, random bfloat16 weights in mapped safetensors, a small video, recorded
random trajectories. Of each way: seconds, peak anonymous memory beyond what the traced graph takes, and whether the
files are the same. Then one denoising call by segments, and draft and solve of 12 of the blocks.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, random_wan
from benchmarks.memory import Peak, now

PUBLISHED = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2}
SOLVED_BLOCKS = 12
TRAJECTORIES, TIMESTEPS = 2, (1000.0, 500.0)
BUDGETS = (2**30,)


def run(arguments: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="scale-calibration-"))
    try:
        settings = SMALL if arguments.small else PUBLISHED
        few = settings | {"num_layers": min(SOLVED_BLOCKS, settings["num_layers"])}
        stored = random_wan.write(folder / "all", settings)
        random_wan.write(folder / "few", few)
        asked = {"place": str(folder / "all"), "threads": arguments.threads}
        measured = common.in_child("scale_calibration", "ways", asked, arguments.threads)
        few_asked = asked | {"place": str(folder / "few")}
        solved = common.in_child("scale_calibration", "solving", few_asked, arguments.threads)
        _write(arguments, settings, stored, measured["ways"], measured["call"], solved)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepared(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(canonical float graph over the mapped weights, the model with trajectories of random numbers)."""
    from vdq_export import pipeline, sources
    from vdq_export.contract import PassContext
    from vdq_export.trace import trace

    model = sources.resolve(f"{settings['place']}?frames=1&height=128&width=128&steps={len(TIMESTEPS)}")
    model.trajectories = [trajectory(number, model.example_inputs) for number in range(TRAJECTORIES)]
    graph = trace(model)
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    return graph, model


def trajectory(number: int, like: Mapping[str, torch.Tensor]) -> list[Any]:
    generator = torch.Generator().manual_seed(number)
    prompt = like["encoder_hidden_states"].shape
    texts = {branch: torch.randn(prompt, generator=generator) for branch in ("cond", "uncond")}
    made = []
    for t in TIMESTEPS:
        latent = torch.randn(like["hidden_states"].shape, generator=generator)
        timestep = torch.tensor([t], dtype=like["timestep"].dtype)
        for branch, text in texts.items():
            inputs = {"hidden_states": latent, "timestep": timestep, "encoder_hidden_states": text}
            made.append({"t": t, "branch": branch, "inputs": inputs})
    return made


def ways(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: one process, for tracing takes longer than what is measured; the largest comes last."""
    from vdq_export.calib.blocks import observe_blocks
    from vdq_export.calib.observe import observe
    from vdq_export.work.store import WorkStore

    threads = settings["threads"]
    graph, model = prepared(settings)
    before, found = now()["anonymous"], []

    def by_segments(budget: int, folder: Path) -> Any:
        with WorkStore(folder / "work") as store:
            return observe_blocks(graph, model, store, budget=budget, threads=threads)

    for budget in BUDGETS:
        found.append(_measured(partial(by_segments, budget), before) | {"budget": budget})
    call = _call(graph, model, threads, before)
    found.append(_measured(lambda folder: observe(graph, model, threads=threads), before) | {"budget": 0})
    return {"ways": found, "call": call}


def _measured(observed: Callable[[Path], Any], before: int) -> dict[str, Any]:
    gc.collect()
    with tempfile.TemporaryDirectory(prefix="vdq-observed-") as temporary:
        place, began = Path(temporary) / "record.safetensors", time.monotonic()
        with Peak() as peak:
            observed(Path(temporary)).save(place)
        seconds = time.monotonic() - began
        digest, size = hashlib.sha256(place.read_bytes()).hexdigest(), place.stat().st_size
    calls = TRAJECTORIES * len(TIMESTEPS) * 2
    answer = {
        "seconds": seconds,
        "calls": calls,
        "anonymous": peak.anonymous - before,
        "digest": digest,
        "record": size,
    }
    print(answer, file=sys.stderr, flush=True)
    return answer


def _call(graph: Any, model: Any, threads: int, before: int) -> dict[str, Any]:
    """One denoising call by segments."""
    from vdq_export.graphs.segments import SegmentedNetwork

    network = SegmentedNetwork(graph, budget=BUDGETS[0], threads=threads)
    seconds = []
    with Peak() as peak:
        for step in model.trajectories[0][:2]:
            began = time.monotonic()
            network(**step["inputs"])
            seconds.append(time.monotonic() - began)
    return {"seconds": min(seconds), "anonymous": peak.anonymous - before, "segments": len(network.segments)}


def solving(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: draft and solve, smoothing searched on part of the layers' columns."""
    from vdq_export import recipe as recipes
    from vdq_export.calib.blocks import observe_blocks
    from vdq_export.calib.draft import Network, draft
    from vdq_export.calib.record import CalibrationRecord
    from vdq_export.calib.solve import solve
    from vdq_export.contract import PassContext
    from vdq_export.pipeline import FLOAT, run_passes
    from vdq_export.targets import ort_int8
    from vdq_export.work.store import WorkStore

    graph, model = prepared(settings)
    spec, answer = ort_int8.spec(), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="vdq-solved-") as temporary:
        with WorkStore(Path(temporary) / "work") as store:
            observe_blocks(graph, model, store, threads=settings["threads"]).save(Path(temporary) / "record")
        for name in ("smoothquant", "w8a16"):
            record = CalibrationRecord.load(Path(temporary) / "record")
            before, began = now()["anonymous"], time.monotonic()
            with Peak() as peak:
                plan = draft(Network(graph, record, recipes.load(name), spec))[0]
                floated = graph.copy()
                run_passes(floated, FLOAT, PassContext(plan, None, spec))
                solve(plan, floated, record, spec)
            answer[name] = {"seconds": time.monotonic() - began, "anonymous": peak.anonymous - before}
    weights = sum(one._values.nbytes for one in graph.constants())
    return answer | {"weights": int(weights)}


def _write(
    arguments: argparse.Namespace,
    settings: dict[str, int],
    stored: int,
    ways: list[dict[str, Any]],
    call: dict[str, Any],
    solved: dict[str, Any],
) -> None:
    rows = [
        (
            f"segments of {one['budget'] >> 20} MiB" if one["budget"] else "the whole graph",
            f"{one['seconds']:.0f}",
            f"{one['seconds'] / one['calls']:.2f}",
            f"{one['anonymous'] / 1e9:.2f}",
            "yes" if one["digest"] == ways[0]["digest"] else "NO",
        )
        for one in ways
    ]
    others = [
        ("one denoising call by segments, seconds", f"{call['seconds']:.1f}"),
        (f"… of {call['segments']} segments, peak anonymous GB", f"{call['anonymous'] / 1e9:.2f}"),
    ]
    for name in ("smoothquant", "w8a16"):
        others.append((f"draft and solve, {name}, seconds", f"{solved[name]['seconds']:.0f}"))
        others.append(("… peak anonymous GB", f"{solved[name]['anonymous'] / 1e9:.2f}"))
    tables: list[common.Table] = [
        ("Calibration", ["way", "seconds", "seconds a call", "peak anonymous GB", "the same file"], rows),
        ("Beside it", ["", ""], others),
    ]
    notes = (
        f"WanTransformer3DModel, {settings['num_layers']} blocks, {stored / 1e9:.2f} GB of random bfloat16 weights, "
        f"one frame of 128 x 128 (64 latent tokens), 512 text tokens, {ways[0]['calls']} calls, "
        f"{arguments.threads} thread(s). "
        "Memory: anonymous, beyond what the process had when graph and trajectories were there. Seconds include the "
        f"hash of the graph and the writing of the record ({ways[0]['record'] / 1e6:.0f} MB). Draft and solve: "
        f"{min(SOLVED_BLOCKS, settings['num_layers'])} blocks, {solved['weights'] / 1e9:.2f} GB in float32, plan and "
        "integer weights' scales kept."
    )
    data = {"ways": ways, "call": call, "solving": solved, "settings": settings}
    title = "Calibration of a network that does not fit in memory"
    common.write("scale-calibration", title, tables, data, notes, small=arguments.small, module="scale_calibration")


if __name__ == "__main__":
    common.main(common.parser(__doc__), run, {"ways": ways, "solving": solving})
