"""Wan at its true size on a small machine: 1.3B in 8 bits with 4 timestep bins, 14B with 8-bit weights and no data.

Weights are random bfloat16 in sharded folders (benchmarks/random_wan.py), made under build/benchmarks/scale and removed
afterwards where they are large. Each step is a process of its own. Memory is what the export holds itself: anonymous
and shared memory (RssAnon + RssShmem of /proc) of the process and all its children, looked at every 20 ms; mapped
weights and the bundle's own pages are the kernel's to drop and are not counted.

14B reads 28 GB and writes 14 GB: --only 1.3B leaves it out; a plain copy of its weights in the same run, through the
same disk, is what its speed is compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks import common

FOLDER = common.WORK / "scale"
GB, GIB = 1e9, 2**30
SIZES = {
    "1.3B": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "14B": {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
}
SMALL = {
    "1.3B": {"num_attention_heads": 2, "ffn_dim": 512, "num_layers": 2, "text_dim": 256},
    "14B": {"num_attention_heads": 3, "ffn_dim": 768, "num_layers": 2, "text_dim": 256},
}
# The video sets neither time nor memory of an export but through constants: rotary tables, held once.
VIDEO = {"frames": 5, "height": 64, "width": 64}
STEPS = 4
RECIPE = {"1.3B": "static-asq", "14B": "w8a16"}
GOALS = {"1.3B": "≤ 300 s, ≤ 3 GiB", "14B": "≤ 8 GiB, ≥ 0.3 × copy"}


class Held:
    """`with Held() as held:` then held.peak: bytes that this process and its children held themselves, at most."""

    peak = 0

    def __enter__(self) -> Held:
        self.before = _held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, _held())


def _held() -> int:
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        with suppress(OSError, psutil.Error):  # a child may end while it is looked at
            text = Path(f"/proc/{process.pid}/status").read_text()
            total += 1024 * sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, re.M))
    return total


def settings_of(name: str, small: bool) -> dict[str, Any]:
    return (SMALL if small else SIZES)[name]


def model_of(name: str, small: bool) -> Path:
    return FOLDER / ("small" if small else "full") / name / "model"


def make(task: dict[str, Any]) -> dict[str, Any]:
    """Task: the weights of one model, and a trajectory of random latents at the sampler's timesteps."""
    import torch

    from benchmarks import random_wan
    from vdq_export import recorded

    folder, settings = model_of(task["name"], task["small"]), settings_of(task["name"], task["small"])
    size = random_wan.write(folder, settings)
    generator = torch.Generator().manual_seed(0)
    rows, columns = VIDEO["height"] // 8, VIDEO["width"] // 8
    text = torch.randn(1, 512, settings.get("text_dim", 4096), generator=generator)
    steps: list[Any] = [
        {
            "t": t,
            "branch": "cond",
            "inputs": {
                "hidden_states": torch.randn(1, 16, (VIDEO["frames"] - 1) // 4 + 1, rows, columns, generator=generator),
                "timestep": torch.tensor([t]),
                "encoder_hidden_states": text,
            },
        }
        for t in torch.linspace(999.0, 250.0, STEPS).tolist()
    ]
    place = folder.parent / "trajectories"
    place.mkdir(exist_ok=True)
    recorded.save(steps, place / "0.safetensors")
    return {"weight_bytes": size}


def spec(folder: Path) -> str:
    chosen = {**VIDEO, "trajectories": folder.parent / "trajectories"}
    return f"{folder}?" + "&".join(f"{key}={value}" for key, value in chosen.items())


def calibrate(task: dict[str, Any]) -> dict[str, Any]:
    """Task: the calibration record, once; its time and memory are not the export's."""
    from vdq_export import pipeline, sources
    from vdq_export.calib.observe import observe
    from vdq_export.contract import PassContext
    from vdq_export.trace import trace

    folder = model_of(task["name"], task["small"])
    model = sources.resolve(spec(folder))
    start = time.perf_counter()
    graph = trace(model)
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    observe(graph, model).save(folder.parent / "record.safetensors")
    return {"seconds": time.perf_counter() - start}


def export(task: dict[str, Any]) -> dict[str, Any]:
    """Task: folder -> finished bundle."""
    from vdq_export import compiler, recipe
    from vdq_export.progress import Reporter

    stages: dict[str, dict[str, float]] = {}

    class Timed(Reporter):
        @contextmanager
        def stage(self, name: str) -> Iterator[Any]:
            start, cpu = time.perf_counter(), time.process_time()
            yield lambda done, total: None
            stages[name] = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    folder, out = model_of(task["name"], task["small"]), Path(task["out"])
    shutil.rmtree(out, ignore_errors=True)
    chosen, more = recipe.load(RECIPE[task["name"]]), dict[str, Any]()
    if chosen.needs_data:
        more = {"tsw": 4, "calibration": folder.parent / "record.safetensors"}
    else:  # min/max instead of a search of 13 bounds: what is measured is moving the weights, not choosing their grid
        weights: Any = msgspec.structs.replace(chosen.weights, range="minmax")
        chosen = msgspec.structs.replace(chosen, weights=weights)
    with Held() as held:
        start, cpu = time.perf_counter(), time.process_time()
        bundle = compiler.export(spec(folder), recipe=chosen, out=out, reporter=Timed(), **more)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = sum(entry.size for entry in bundle.manifest.files)
    return {
        "seconds": seconds, "cpu": cpu, "stages": stages, "peak_held": held.peak, "held_before": held.before,
        "bundle_bytes": size, "bins": len(bundle.schedule.bins), "recipe": chosen.name,
    }  # fmt: skip


def play(task: dict[str, Any]) -> dict[str, Any]:
    """Task: the bundle, checked and run at every recorded step."""
    import numpy as np

    import vdq_export
    from vdq_export import recorded
    from vdq_export.bundle import Bundle

    folder = model_of(task["name"], task["small"])
    start = time.perf_counter()
    Bundle.open(Path(task["out"]), verify_hashes=True)
    checked = time.perf_counter() - start
    network = vdq_export.load(task["out"])
    start, seconds = time.perf_counter(), []
    for step in next(iter(recorded.Recorded(folder.parent / "trajectories"))):
        start = time.perf_counter()
        found = network(**step["inputs"], return_dict=False)[0]
        seconds.append(time.perf_counter() - start)
        assert found.shape == step["inputs"]["hidden_states"].shape
        assert np.isfinite(found.numpy()).all()
    return {"check_seconds": checked, "step_seconds": seconds}


def copy(task: dict[str, Any]) -> dict[str, Any]:
    """Task: the weights' files copied and flushed to disk, as `cp` does."""
    folder = model_of(task["name"], task["small"])
    place = folder.parent / "copy"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    start, size = time.perf_counter(), 0
    for file in sorted(folder.glob("*.safetensors")):
        shutil.copyfile(file, place / file.name)
        handle = os.open(place / file.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        size += file.stat().st_size
        (place / file.name).unlink()  # a copy at a time: the disk may be small
    place.rmdir()
    return {"seconds": time.perf_counter() - start, "bytes": size}


def run(arguments: argparse.Namespace) -> None:
    data: dict[str, Any] = {}
    for name in SIZES:
        kept = FOLDER / ("small" if arguments.small else "full") / f"{name}.json"
        if arguments.only in (None, name):
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(_measure(name, arguments)))
        if kept.is_file():
            data[name] = json.loads(kept.read_text())
    report(arguments, data)


def _measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    folder = model_of(name, arguments.small)
    task = {"name": name, "small": arguments.small, "out": str(folder.parent / "bundle")}

    def child(kind: str) -> dict[str, Any]:
        return common.in_child("scale_wan", kind, task, arguments.threads)

    found = {"make": child("make")}
    if name == "1.3B" and not (folder.parent / "record.safetensors").is_file():
        found["calibrate"] = child("calibrate")
    if name == "14B":
        found["copy"] = child("copy")
    found["export"] = child("export")
    found["play"] = child("play") if name == "1.3B" or arguments.small else {}
    shutil.rmtree(task["out"])
    if not arguments.keep:
        shutil.rmtree(folder.parent)
    return found


def report(arguments: argparse.Namespace, data: dict[str, Any]) -> None:
    rows = []
    for name, one in data.items():
        made = one["export"]
        weights = one["make"]["weight_bytes"]
        speed = weights / made["seconds"]
        ratio = "–"
        if "copy" in one:
            ratio = f"{speed / (one['copy']['bytes'] / one['copy']['seconds']):.2f}"
        steps = one["play"].get("step_seconds")
        rows.append([
            f"Wan2.1-{name}", f"{weights / GB:.2f}", f"{made['recipe']}, {made['bins']} bin(s)",
            f"{made['seconds']:.0f}", f"{made['peak_held'] / GIB:.2f}", f"{made['bundle_bytes'] / GB:.2f}",
            f"{speed / 1e6:.0f}", ratio, f"{statistics.median(steps):.2f}" if steps else "–", GOALS[name],
        ])  # fmt: skip
    heads = [
        "model", "weights, GB", "recipe", "export, s", "peak held, GiB", "bundle, GB", "MB/s", "× copy", "step, s",
        "goal",
    ]  # fmt: skip
    stages = [
        [f"{name}: {stage}", f"{one['seconds']:.1f}", f"{one['cpu']:.1f}"]
        for name in data
        for stage, one in data[name]["export"]["stages"].items()
    ]
    notes = (
        f"True configurations, random bfloat16 weights, {VIDEO['frames']} frames of "
        f"{VIDEO['height']}×{VIDEO['width']}, "
        f"512 text tokens; {arguments.threads} threads. From the folder to the finished bundle, tracing and hashing "
        "included. 1.3B starts from a saved calibration record (random latents at 4 timesteps): static-asq, the "
        "recipe a user gets, smoothing searched for. 14B: w8a16 with min/max ranges, which needs no data. Held: "
        "anonymous and shared memory of the process and its workers, imports included; mapped weights and the "
        "bundle's own pages are not in it. MB/s: bytes of the weights by time; × copy: against a plain copy of the "
        "weights' files, flushed to disk, in the same run."
    )
    tables: list[common.Table] = [("", heads, rows), ("Stages", ["stage", "s", "CPU s"], stages)]
    common.write("scale-wan", "Wan at true size", tables, data, notes, small=arguments.small, module="scale_wan")


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--only", choices=list(SIZES), help="one of the models; what the other found is kept")
    made.add_argument("--keep", action="store_true", help="keep the models and the record under build/")
    return made


if __name__ == "__main__":
    tasks = {"make": make, "calibrate": calibrate, "export": export, "play": play, "copy": copy}
    common.main(parse(), run, tasks)
