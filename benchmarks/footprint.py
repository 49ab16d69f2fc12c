"""What more bins cost: bytes of the bundle, memory of a whole schedule, and the stall where a step changes graphs.

Each measurement is a fresh process that runs the 20-step schedule of the Wan-shaped blocks through the runtime. Memory
is resident memory (RSS): heap, arenas and every mapped page that was touched, the weight file's included, since a
device must hold those too. "Above imports" subtracts what the process held with everything imported, nothing loaded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, ours, wan
from benchmarks.contestant import read_calls
from benchmarks.memory import Peak

PASSES = 3  # times the schedule is run in one process; the first meets cold caches and counts for memory only
KINDS = {"4 bins, whole schedule": (4, True), "4 bins, only the first": (4, False), "1 bin, whole schedule": (1, True)}


def run(arguments: argparse.Namespace) -> None:
    prepared = wan.prepare(wan.SMALL if arguments.small else wan.FULL)
    for bins in (1, 4):
        ours.export_bundle(prepared, bins)
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for _ in range(arguments.rounds):
        for kind, (bins, whole) in KINDS.items():
            settings = {"bundle": str(prepared.bundle(bins)), "calls": str(prepared.calibration), "whole": whole}
            settings["threads"] = arguments.threads
            found[kind].append(common.in_child("footprint", "schedule", settings, arguments.threads))
    report(arguments, prepared, found)


def schedule(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: run the schedule PASSES times. whole: False calls with the first bin's timesteps only, without prefetch."""
    import vdq_export

    # The first calls of the calibration show every timestep once, a few of each of several prompts.
    calls = sorted(read_calls(settings["calls"])[: wan.STEPS], key=lambda call: -float(call["timestep"][0]))
    with Peak() as peak:
        transformer = vdq_export.load(
            settings["bundle"], threads=settings["threads"], prefetch=settings["whole"], verify_hashes=False
        )
        bins = [transformer.schedule.select(float(call["timestep"][0])) for call in calls]
        if not settings["whole"]:
            first = [call for call, index in zip(calls, bins, strict=True) if index == bins[0]]
            calls = [first[number % len(first)] for number in range(len(calls))]
            bins = [bins[0]] * len(calls)
        seconds = []
        for _ in range(PASSES):
            for call in calls:
                start = time.perf_counter()
                transformer(**call)
                seconds.append(time.perf_counter() - start)
    cost = transformer.statistics
    transformer.close()
    return {**peak.as_dict(), "seconds": seconds, "bins": bins * PASSES, "statistics": vars(cost)}


def stalls(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of a median step: the waits the runtime counted, and how much longer steps are that change graphs."""
    waits, excess, elsewhere = [], [], []
    for one in runs:
        steps = list(zip(one["seconds"], one["bins"], [None, *one["bins"]], strict=False))[wan.STEPS :]
        typical = statistics.median(seconds for seconds, now, before in steps if now == before)
        excess += [seconds / typical - 1 for seconds, now, before in steps if now != before]
        elsewhere += [seconds / typical - 1 for seconds, now, before in steps if now == before]
        counted = one["statistics"]
        waits.append(counted["stall_seconds"] / max(1, counted["switches"]) / typical)
    return {
        "mean_wait": statistics.fmean(waits),
        "median_excess_at_switch": statistics.median(excess),
        "worst_excess_at_switch": max(excess),
        "worst_excess_elsewhere": max(elsewhere),
        "switches": len(excess),
    }


def report(arguments: argparse.Namespace, prepared: wan.Prepared, found: dict[str, list[dict[str, Any]]]) -> None:
    sizes = {bins: folder_bytes(prepared.bundle(bins)) for bins in (1, 4)}
    peak, anonymous, above = {}, {}, {}
    for kind, runs in found.items():
        peak[kind] = statistics.median(one["peak_rss"] for one in runs)
        anonymous[kind] = statistics.median(one["peak_anonymous"] for one in runs)
        above[kind] = statistics.median(one["peak_rss"] - one["rss_before"] for one in runs)
    everything, first = list(KINDS)[:2]
    stall = stalls(found[everything])
    memory = [
        [kind, *(f"{value[kind] / 1e6:.1f}" for value in (peak, above, anonymous)), f"{above[kind] / above[first]:.3f}"]
        for kind in KINDS
    ]
    size_rows = [[str(bins), f"{size / 1e6:.2f}", f"{size / sizes[1]:.4f}"] for bins, size in sizes.items()]
    heads = ["run", "peak RSS", "above imports", "anonymous", "above imports, × first bin"]
    stall_rows = [
        ["mean wait for the next graph at a switch", f"{100 * stall['mean_wait']:.2f}"],
        ["extra time of the step at a switch, median", f"{100 * stall['median_excess_at_switch']:.2f}"],
        ["extra time of the step at a switch, worst", f"{100 * stall['worst_excess_at_switch']:.2f}"],
        ["the same of any other step, worst (noise)", f"{100 * stall['worst_excess_elsewhere']:.2f}"],
    ]
    tables: list[common.Table] = [
        ("Bundle", ["bins", "MB", "× 1 bin"], size_rows),
        ("Peak memory of a run, MB", heads, memory),
        ("Switching graphs, share of a median step", ["measure", "%"], stall_rows),
    ]
    notes = (
        f"Blocks: {prepared.shape.title}. Every run is {PASSES} × {wan.STEPS} steps in a fresh process, "
        f"{arguments.threads} threads, medians of {arguments.rounds} processes. The {stall['switches']} switches are "
        "those after the first pass, the jump back to the first bin included. Peak RSS is the kernel's high-water mark "
        "and counts file-backed pages (mapped weights, libraries) like any other; anonymous memory is sampled every "
        '10 ms. "Only the first" runs as many steps on one bin of the same bundle, with nothing else loaded.'
    )
    data = {
        "shape": prepared.shape.title, "threads": arguments.threads, "rounds": arguments.rounds, "bundle_bytes": sizes,
        "peak_rss": peak, "above_imports": above, "anonymous": anonymous, "stall": stall, "runs": found,
    }  # fmt: skip
    common.write("footprint", "What timestep bins cost", tables, data, notes, small=arguments.small)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="fresh processes of each kind (default 3)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"schedule": schedule})
