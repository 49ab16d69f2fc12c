"""Time and memory of making an int8 model of the Wan-shaped blocks: ours with 4 bins against quantize_static.

Both start from the same float .onnx file (weights in a file beside it) and from finished calibration: ours from its
calibration record, quantize_static from its own calibration cache, so that neither runs the model. Each export is a
fresh process; imports are not timed. Peak memory is the process's highest RSS, imports and mapped files included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common, wan
from benchmarks.memory import Peak

BINS = 4
PHASES = {
    "vdq-export, 4 bins": ("ours", "seconds", "peak_rss"),
    "quantize_static": ("static", "seconds", "peak_rss"),
    "quantize_static's preprocessing": ("static", "preprocess_seconds", "preprocess_peak_rss"),
}


def run(arguments: argparse.Namespace) -> None:
    prepared = wan.prepare(wan.SMALL if arguments.small else wan.FULL)
    folder = prepared.folder / "cost"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = {"small": arguments.small, "folder": str(folder)}
    common.in_child("export_cost", "static_ranges", settings, arguments.threads)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "static": []}
    for _ in range(arguments.rounds):
        for task, answers in found.items():
            answers.append(common.in_child("export_cost", task, settings, arguments.threads))
    shutil.rmtree(folder)
    report(arguments, prepared.shape, found)


def measured(work: Callable[[], object]) -> dict[str, Any]:
    with Peak() as peak:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, **peak.as_dict()}


def prepared_files(settings: dict[str, Any]) -> wan.Prepared:
    return wan.Prepared(Path(settings["folder"]).parent, wan.SMALL if settings["small"] else wan.FULL)


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: float .onnx + record -> finished bundle."""
    from benchmarks.ours import export_bundle

    prepared, out = prepared_files(settings), Path(settings["folder"]) / "bundle"
    return measured(lambda: export_bundle(prepared, BINS, out))


def static_ranges(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: preprocess and calibrate once, on one call, to fill quantize_static's cache; not measured."""
    from benchmarks import peer_static
    from benchmarks.contestant import read_calls

    prepared, folder = prepared_files(settings), Path(settings["folder"])
    peer_static.preprocess(prepared.traced, folder / "preprocessed.onnx")
    calls = read_calls(str(prepared.calibration))[:1]
    peer_static.quantize(folder / "preprocessed.onnx", folder / "static.onnx", calls, folder / "ranges.json")
    return {}


def static(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: preprocess, then quantize_static with its cache filled; each with its own time and peak."""
    from benchmarks import peer_static

    prepared, folder = prepared_files(settings), Path(settings["folder"])
    model = folder / "preprocessed.onnx"
    first = measured(lambda: peer_static.preprocess(prepared.traced, model))
    second = measured(lambda: peer_static.quantize(model, folder / "static.onnx", None, folder / "ranges.json"))
    return {**second, **{f"preprocess_{key}": value for key, value in first.items()}}


def report(arguments: argparse.Namespace, shape: wan.Shape, found: dict[str, list[dict[str, Any]]]) -> None:
    medians = {
        name: {"seconds": middle(found[task], seconds), "peak": middle(found[task], peak)}
        for name, (task, seconds, peak) in PHASES.items()
    }
    own = medians[next(iter(PHASES))]
    rows = [
        [name, f"{one['seconds']:.2f}", f"{one['seconds'] / own['seconds']:.1f}", f"{one['peak'] / 1e6:.0f}",
         f"{one['peak'] / own['peak']:.1f}"]
        for name, one in medians.items()
    ]  # fmt: skip
    anonymous = {task: middle(answers, "peak_anonymous") / 1e6 for task, answers in found.items()}
    before = {task: middle(answers, "rss_before") / 1e6 for task, answers in found.items()}
    notes = (
        f"Blocks: {shape.title}. Medians of {arguments.rounds} fresh processes each, alternating, {arguments.threads} "
        "threads. Ours traces nothing here and quantize_static calibrates nothing: the float .onnx file, our "
        "calibration record and its calibration cache (filled by one call) are on disk. "
        f"Anonymous memory peaks at {anonymous['ours']:.0f} MB in ours and {anonymous['static']:.0f} MB in "
        f"quantize_static, the rest is mapped files; imports alone take {before['ours']:.0f} and "
        f"{before['static']:.0f} MB. Preprocessing is quantize_static's documented first step; it is not counted in "
        "its row."
    )
    heads = ["export", "seconds", "× ours", "peak RSS, MB", "× ours"]
    data = {"shape": shape.title, "threads": arguments.threads, "medians": medians, "runs": found}
    title = "Cost of an export, calibration excluded"
    common.write("export_cost", title, [("", heads, rows)], data, notes, small=arguments.small)


def middle(answers: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(answer[key] for answer in answers))


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="fresh processes of each kind (default 3)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"ours": ours, "static": static, "static_ranges": static_ranges})
