"""What low-rank branches and explicit rotations cost at run time: the ten linears of one Wan-1.3B-shaped block, W8A8.

The block of `solve_speed` for ort-int8: plain, with float branches of rank 16 and 32, and with every input rotated by
an explicit Hadamard matrix. All run in turn, in one process; ratios to the plain one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
from msgspec.structs import replace

from benchmarks import common, solve_speed
from vdq_export import ort, pipeline, targets
from vdq_export import recipe as recipes
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.solve import solve
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.recipe import LowRankRecipe, Recipe, RotationRecipe

TARGET = "ort-int8"
PLAIN = "integer linears alone"


def variants() -> dict[str, Recipe]:
    plain = replace(recipes.load("static-minmax"), keep_float=())
    return {
        PLAIN: plain,
        "with branches of rank 16": replace(plain, low_rank=LowRankRecipe(rank=16)),
        "with branches of rank 32": replace(plain, low_rank=LowRankRecipe(rank=32)),
        "with explicit rotations": replace(plain, rotation=RotationRecipe(kind="hadamard", search=False)),
    }


def run(arguments: argparse.Namespace) -> None:
    measured = common.in_child("branch_cost", "timed", vars(arguments) | {"task": None}, arguments.threads)
    plain = measured["seconds"][PLAIN]
    rows = []
    for name, seconds in measured["seconds"].items():
        ratios = [a / b for a, b in zip(seconds, plain, strict=True)]
        rows.append(
            [name, f"{1000 * statistics.median(seconds):.1f}", f"{statistics.median(ratios):.2f}",
             f"{min(ratios):.2f} – {max(ratios):.2f}"]
        )  # fmt: skip
    shape = solve_speed.SHAPES[arguments.small]
    notes = (
        f"Width {shape.width}, FFN {shape.ffn}, 512 rows, {arguments.threads} threads, {arguments.rounds} rounds in "
        "turn; medians. The block's norms and attention are not in it: of a whole network's time a branch is less."
    )
    heads = ["linears", "ms a run", "× plain", "range of the rounds"]
    common.write(
        "branch_cost", "Run-time cost of branches and rotations", [("", heads, rows)], measured, notes,
        small=arguments.small,
    )  # fmt: skip


def timed(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: seconds of each variant's runs, by round."""
    made = solve_speed.made(solve_speed.SHAPES[settings["small"]])
    sessions = {name: session(made, one, settings["threads"]) for name, one in variants().items()}
    feeds = {one.name: np.random.default_rng(0).standard_normal(one.shape, np.float32) for one in made.graph.gs.inputs}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for number in range(settings["rounds"] + 1):
        for name, one in sessions.items():
            start = time.perf_counter()
            for _ in range(3):
                one.run(None, feeds)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / 3)
    return {"seconds": seconds}


def session(network: Network, recipe: Recipe, threads: int) -> onnxruntime.InferenceSession:
    spec = targets.load(TARGET).spec(None)
    (one,) = draft(Network(network.graph, network.record, recipe, spec), tsw=1)
    graph: Graph = network.graph.copy()
    pipeline.run_passes(graph, pipeline.FLOAT, PassContext(one, None, spec))
    solved = solve(one, graph, network.record, spec)
    context = PassContext(solved.plan, solved.plan.bins[0], spec, solved.tensors)
    pipeline.run_passes(graph, (*pipeline.SHARED, *pipeline.PER_BIN), context)
    return ort.session(graph, threads=threads)


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=15, help="times every variant is run (default 15)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"timed": timed})
