"""Step time of int8 Wan-1.3B-shaped blocks with and without hoisting: two bundles of one record, runs alternating.

Both sit in processes of their own with the same threads and inputs, called as a pipeline would: the prompt stays, the
timestep and the latents change. Each round gives one ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks import common, ours, wan
from vdq_export.bundle import Bundle
from vdq_export.metrics import sqnr_db
from vdq_export.report.hoisting import HOISTING, HoistingReport

HOISTED, WHOLE = "hoisted", "--no-hoist"
CALL = 1  # the held-out call that is timed, in the second quarter of the schedule


def run(arguments: argparse.Namespace) -> None:
    prepared = wan.prepare(wan.SMALL if arguments.small else wan.FULL)
    bundles = {name: ours.export_bundle(prepared, 4, hoist=name == HOISTED) for name in (HOISTED, WHOLE)}
    shared = {"threads": arguments.threads, "held_out": str(prepared.held_out), "kind": "bundle"}
    running: dict[str, common.Child] = {}
    seconds: dict[str, list[float]] = {name: [] for name in bundles}
    outputs = {}
    try:
        for name, path in bundles.items():
            running[name] = common.Child("contestant", {**shared, "path": str(path)}, arguments.threads, sys.executable)
        for name, child in running.items():
            child.ask(do="outputs", path=str(prepared.folder / "outputs.npz"))
            with np.load(prepared.folder / "outputs.npz") as stored:
                outputs[name] = np.stack([stored[f"arr_{number}"] for number in range(len(stored.files))])
        for number in range(arguments.rounds + 1):
            for name, child in running.items():
                found = child.ask(do="run", call=CALL, repeat=arguments.repeat)["seconds"]
                if number:  # the first round warms up
                    seconds[name].append(statistics.median(found))
    finally:
        for child in running.values():
            child.close()
    _report(arguments, prepared, bundles, seconds, float(sqnr_db(outputs[WHOLE], outputs[HOISTED])))


def _report(
    arguments: argparse.Namespace,
    prepared: wan.Prepared,
    bundles: Mapping[str, Path],
    seconds: Mapping[str, list[float]],
    agreement: float,
) -> None:
    opened = {name: Bundle.open(path) for name, path in bundles.items()}
    (moved,) = HoistingReport.from_json((bundles[HOISTED] / HOISTING).read_bytes()).networks
    lower = [1 - own / whole for own, whole in zip(seconds[HOISTED], seconds[WHOLE], strict=True)]
    rows = [
        [name, f"{1000 * statistics.median(seconds[name]):.1f}", f"{opened[name].size / 1e6:.1f}"] for name in bundles
    ]
    notes = (
        f"Step time {statistics.median(lower):.1%} lower with hoisting (rounds: {min(lower):.1%} – {max(lower):.1%}); "
        f"{moved.moved:.1%} of the float weight bytes and {moved.saved:.1%} of the multiply-adds left the step, "
        f"{moved.values} values ({moved.value_bytes / 1e6:.2f} MB) cross. The two bundles' outputs agree to "
        f"{agreement:.1f} dB: hoisted linears have float activations, so they differ by what quantizing these costs. "
        f"Blocks: {prepared.shape.title}; random weights N(0, 1/K), seed {wan.WEIGHT_SEED}; recipe {ours.RECIPE}, 4 "
        f"bins; {arguments.threads} threads; {arguments.rounds} alternating rounds of {arguments.repeat} calls after "
        f"one to warm up."
    )
    data = {"seconds": dict(seconds), "lower": lower, "agreement_db": agreement, "shape": prepared.shape.title}
    title = "Step time with and without hoisting"
    heads = ["bundle", "ms a step", "MB"]
    common.write("hoisting_speed", title, [("", heads, rows)], data, notes, small=arguments.small)


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=15, help="alternating rounds (default 15)")
    made.add_argument("--repeat", type=int, default=3, help="calls of a bundle in one round (default 3)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {})
