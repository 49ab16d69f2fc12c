"""TensorRT's formats on the sample: SQNR of the network's output against the float model, and the size handed over.

No TensorRT runs. "consumer dB" is the graph handed over, float parts in FP16, "onnxruntime dB" the verified one in
FP32, both on onnxruntime's CPU provider. That has no FLOAT4E2M1: NVFP4's numbers are FLOAT8E4M3FN there, the same ones.
The steps are every STRIDE-th of the first recorded trajectory, the dB those of the bin that loses most; recipes keep in
float what they always do (embeddings, last layer). The verdict is that of the published rules. Prints a Markdown table:

    python -m benchmarks.handoff_tensorrt [RECIPE …]
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vdq_export
from vdq_export import ort, sources
from vdq_export.bundle import Bundle
from vdq_export.graph import Graph
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, Step
from vdq_export.runtime.ahead import Ahead
from vdq_export.targets._tensorrt_types import half

HEADS = ("target, recipe", "consumer", "verdict", "consumer dB", "onnxruntime dB", "clip PSNR dB", "remark")
FORMATS = {
    "static-minmax": "INT8 × INT8",
    "static-fp8": "FP8 × FP8",
    "mxfp8": "MXFP8 × MXFP8",
    "w4a16-g64": "INT4 in groups of 64 × float",
    "nvfp4": "NVFP4 × NVFP4",
}
STRIDE, BINS = 8, 4


class Measured(NamedTuple):
    verified_db: float
    half_db: float
    megabytes: float
    findings: int


def measure(recipe: str, model: Model, record: Path, folder: Path) -> Measured:
    """Export into `folder`; the calibration record is made once and read again."""
    known = {"calibration": record} if record.exists() else {"save_calibration": record}
    bundle = vdq_export.export(model, target="tensorrt", recipe=recipe, tsw=BINS, out=folder, workers=1, **known)
    steps = list(next(iter(model.iter_trajectories())))[::STRIDE]
    worst = [min(pair) for pair in zip(*(_bin_db(bundle, i, model, steps) for i in range(BINS)), strict=True)]
    size = sum(path.stat().st_size for path in (bundle.path / "handoff" / "tensorrt").rglob("*") if path.is_file())
    lint = json.loads((bundle.path / "handoff" / "lint.json").read_text(encoding="utf-8"))
    return Measured(worst[0], worst[1], size / 1e6, len(lint["findings"]))


def _bin_db(bundle: Bundle, index: int, model: Model, steps: list[Step]) -> tuple[float, float]:
    """(dB of the verified graph, of the one with FP16 parts) over the steps of one bin."""
    verified = Graph.load(bundle.graph_path(index))
    narrow = verified.copy()
    half(narrow, "fp16")
    mine = [step["inputs"] for step in steps if bundle.schedule.select(step["t"], step["branch"]) == index]
    exact = np.stack([model(**one).numpy() for one in mine])
    sessions = [ort.session(graph, options=bundle.manifest.session) for graph in (verified, narrow)]
    with closing(Ahead(bundle)) as ahead:
        feeds = [ahead.arrays(index, sessions[0], {name: one.numpy() for name, one in call.items()}) for call in mine]
    first, second = (sqnr_db(exact, np.stack([session.run(None, one)[0] for one in feeds])) for session in sessions)
    return first, second


def rows(recipes: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """HEADS of each recipe (all of FORMATS unless named), as text, as soon as it is measured."""
    model = sources.resolve("sample:digits")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in recipes or FORMATS:
            found = measure(recipe, model, Path(folder) / "record.safetensors", Path(folder) / recipe)
            yield (
                f"tensorrt, {recipe}", "TensorRT's published rules; not run", f"{found.findings} findings",
                f"{found.half_db:.2f}", f"{found.verified_db:.2f}", "–",
                f"{FORMATS.get(recipe, '')}; {found.megabytes:.2f} MB handed over; consumer dB: FP16 on onnxruntime",
            )  # fmt: skip


def main() -> None:
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    for row in rows(tuple(sys.argv[1:])):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
