"""Speed and noise of int8 Wan-1.3B-shaped blocks: ours, onnxruntime's own quantizer, NNCF + OpenVINO, and float.

Every contestant sits in a process of its own with the same threads, the same calibration calls and the same held-out
inputs. Runs alternate: float, A, B, C, …, float, A, …; each round gives one ratio to the float run of that round, and
the table has the median of the rounds. SQNR compares outputs on held-out calls with the float export in onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, ours, peer_static, peers, wan
from benchmarks.contestant import read_calls
from vdq_export.metrics import sqnr_db

FLOAT = "float export, onnxruntime"
OURS = "vdq-export, 4 bins"
STATIC, PRECISE = "quantize_static, onnxruntime", "quantize_static, x64quantprecision=1"
FLOAT_OPENVINO, NNCF = "float export, OpenVINO", "NNCF quantize, OpenVINO"
CALL = 1  # the held-out call that is timed, in the second quarter of the schedule


def run(arguments: argparse.Namespace) -> None:
    prepared = wan.prepare(wan.SMALL if arguments.small else wan.FULL)
    shared = {"threads": arguments.threads, "held_out": str(prepared.held_out)}
    running: dict[str, common.Child] = {}
    seconds: dict[str, list[float]] = {}
    try:
        for name, settings in contestants(prepared, arguments).items():
            python = str(peers.python()) if settings["kind"] in ("openvino", "nncf") else sys.executable
            running[name] = common.Child("contestant", {**shared, **settings}, arguments.threads, python)
            print(f"{name}: ready after {running[name].hello['load_seconds']:.1f} s", file=sys.stderr)
        noise = output_noise(prepared, running)
        for number in range(arguments.rounds + 1):
            for name, child in running.items():
                found = child.ask(do="run", call=CALL, repeat=arguments.repeat)["seconds"]
                if number:  # the first round warms up
                    seconds.setdefault(name, []).append(statistics.median(found))
            print(f"round {number} of {arguments.rounds}", file=sys.stderr)
        hellos = [child.hello["versions"] for child in running.values()]
    finally:
        for child in running.values():
            child.close()
    report(arguments, prepared.shape, seconds, noise, {name: v for one in hellos for name, v in one.items()})


def contestants(prepared: wan.Prepared, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{name: settings for benchmarks.contestant}; makes the quantized models that do not exist yet."""
    plain, calibration = str(prepared.plain), str(prepared.calibration)
    static = prepared.folder / "quantize_static.onnx"
    if not static.exists():
        settings = {"plain": plain, "calibration": calibration, "out": str(static)}
        common.in_child("speed", "quantize_static", settings, arguments.threads)
    made: dict[str, dict[str, Any]] = {
        FLOAT: {"kind": "onnxruntime", "path": plain},
        OURS: {"kind": "bundle", "path": str(ours.export_bundle(prepared, 4))},
        STATIC: {"kind": "onnxruntime", "path": str(static)},
        PRECISE: {"kind": "onnxruntime", "path": str(static), "options": {"session.x64quantprecision": "1"}},
        FLOAT_OPENVINO: {"kind": "openvino", "path": plain},
        NNCF: {"kind": "nncf", "path": plain, "calibration": calibration},
    }
    return {name: one for name, one in made.items() if not arguments.no_peers or name in (FLOAT, OURS)}


def quantize_static(settings: dict[str, Any]) -> dict[str, Any]:
    """Task: the peer's int8 model from the plain float export and all calibration calls."""
    out = Path(settings["out"])
    preprocessed = out.with_name("preprocessed.onnx")
    peer_static.preprocess(Path(settings["plain"]), preprocessed)
    peer_static.quantize(preprocessed, out, read_calls(settings["calibration"]))
    for path in (preprocessed, preprocessed.with_name("preprocessed.onnx.data")):
        path.unlink()
    return {}


def output_noise(prepared: wan.Prepared, running: Mapping[str, common.Child]) -> dict[str, float]:
    """SQNR (dB) of each contestant's outputs over all held-out calls against the float export's; {} for that one."""
    outputs = {}
    for name, child in running.items():
        path = prepared.folder / "outputs.npz"
        child.ask(do="outputs", path=str(path))
        with np.load(path) as stored:
            outputs[name] = np.stack([stored[f"arr_{number}"] for number in range(len(stored.files))])
    return {name: float(sqnr_db(outputs[FLOAT], made)) for name, made in outputs.items() if name != FLOAT}


def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """How many times faster than float, round by round."""
    return [reference / own for reference, own in zip(seconds[FLOAT], seconds[name], strict=True)]


def report(
    arguments: argparse.Namespace,
    shape: wan.Shape,
    seconds: Mapping[str, Sequence[float]],
    noise: Mapping[str, float],
    versions: Mapping[str, str],
) -> None:
    rows = []
    for name, measured in seconds.items():
        ratio = ratios(seconds, name)
        spread = f"{min(ratio):.2f} – {max(ratio):.2f}"
        decibels = f"{noise[name]:.1f}" if name in noise else "–"
        milliseconds = f"{1000 * statistics.median(measured):.1f}"
        rows.append([name, f"{statistics.median(ratio):.2f}", spread, milliseconds, decibels])
    heads = ["contestant", "× float", "range", "ms a call", "SQNR dB"]
    notes = (
        f"Blocks: {shape.title}; random weights N(0, 1/K), seed {wan.WEIGHT_SEED}. Calibration: {shape.clips} "
        f"prompts, every {wan.STRIDE}th of {wan.STEPS} steps each (seeds from {wan.CALIBRATION_SEED}), the same for "
        f"all; held out: 4 calls across the schedule (seed {wan.HELD_OUT_SEED}). {arguments.threads} threads; "
        f"{arguments.rounds} alternating rounds of {arguments.repeat} calls after one to warm up; × float is the "
        f"median over rounds of the ratio to the float export's time in the same round, range its extremes. "
        f"vdq-export is measured through its runtime (recipe {ours.RECIPE}); OpenVINO with float32 where it does not "
        f"use integers."
    )
    data = {
        "shape": shape.title, "threads": arguments.threads, "rounds": arguments.rounds, "repeat": arguments.repeat,
        "seconds": dict(seconds), "ratio": {name: ratios(seconds, name) for name in seconds}, "sqnr_db": dict(noise),
        "seeds": {"weights": wan.WEIGHT_SEED, "calibration": wan.CALIBRATION_SEED, "held_out": wan.HELD_OUT_SEED},
        "peer_versions": dict(versions),
    }  # fmt: skip
    title = "Speed and noise of Wan-1.3B-shaped blocks, int8"
    partial = arguments.small or arguments.no_peers
    common.write("speed", title, [("", heads, rows)], data, notes, small=partial)


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--rounds", type=int, default=7, help="alternating rounds (default 7)")
    made.add_argument("--repeat", type=int, default=3, help="calls of a contestant in one round (default 3)")
    made.add_argument("--no-peers", action="store_true", help="float and ours only, while tuning; results go to build/")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"quantize_static": quantize_static})
