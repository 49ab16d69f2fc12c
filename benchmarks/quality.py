"""Do the sample's videos survive? Whole clips of float and bundle compared, judged, and integer kernels counted.

Every bundle generates the same (prompt, seed) cases as the float model, none of them calibrated on. PSNR, SSIM and
temporal-difference error compare clips one by one; the judge needs no reference, and sees more cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import vdq_export
from benchmarks import common
from vdq_export import sources
from vdq_export.metrics import psnr_db, ssim, temporal_difference_error
from vdq_export.model import Model
from vdq_export.trace import trace
from vdq_export.verify import count_kernels

SAMPLES = ("sample:digits", "sample:digits-hard")
MAIN = ("static-asq", 4)
CONFIGURATIONS = (MAIN, ("static-asq", 1), ("static-minmax", 4), ("static-minmax", 1))
MEASURES = ("digit", "direction", "speed")
BATCH = 16  # clips the float model makes at once

Clip = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Result:
    """Measurements of one bundle; lists have one entry a clip. judge: {measure: fraction right}, {} if not judged."""

    sample: str
    recipe: str
    bins: int
    psnr: list[float]
    ssim: list[float]
    temporal: list[float]
    planned: int
    executed: int
    judge: dict[str, float]


def run(arguments: argparse.Namespace) -> None:
    clips, cases = (2, 2) if arguments.small else (arguments.clips, arguments.cases)
    results, float_judge = [], {}
    for sample in SAMPLES:
        model = sources.resolve(sample)
        reference = float_clips(model, max(clips, cases))
        float_judge[sample] = judged(model, reference[:cases])
        graph = trace(model)
        with TemporaryDirectory() as folder:
            record = Path(folder) / "record.safetensors"
            for number, (recipe, bins) in enumerate(CONFIGURATIONS):
                known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
                out = Path(folder) / str(number)
                # traced once for all: passes edit their own copy
                bundle = vdq_export.export(model, recipe=recipe, tsw=bins, out=out, traced={"": graph.copy()}, **known)
                count = max(clips, cases) if (recipe, bins) == MAIN else clips
                made = bundle_clips(bundle.path, model, count, arguments.threads)
                results.append(measure(model, bundle, reference, made, clips, cases))
                print(f"{sample} {recipe} {bins}: {np.mean(results[-1].psnr):.1f} dB", file=sys.stderr)
    report(arguments, clips, cases, results, float_judge)


def float_clips(model: Model, count: int) -> list[Clip]:
    sampler: Any = model.sampler
    made: list[Clip] = sampler.generate_many(model.module, range(count), BATCH)
    return made


def bundle_clips(path: Path, model: Model, count: int, threads: int) -> list[Clip]:
    assert model.sampler is not None
    with vdq_export.load(path, threads=threads) as transformer:
        return [model.sampler.generate(transformer, case) for case in range(count)]


def judged(model: Model, clips: Sequence[Clip]) -> dict[str, float]:
    assert model.judge is not None
    return model.judge(clips, range(len(clips)))


def measure(
    model: Model, bundle: vdq_export.Bundle, reference: list[Clip], made: list[Clip], clips: int, cases: int
) -> Result:
    """clips: how many to compare one by one; the judge sees `cases`, when that many were made."""
    plan = bundle.plan
    kernels, _ = count_kernels(bundle)
    pairs = list(zip(reference, made, strict=False))[:clips]
    return Result(
        sample=model.name,
        recipe=plan.recipe.name,
        bins=len(plan.bins),
        psnr=[psnr_db(a, b) for a, b in pairs],
        ssim=[ssim(a, b) for a, b in pairs],
        temporal=[temporal_difference_error(a, b) for a, b in pairs],
        planned=kernels.planned,
        executed=kernels.executed,
        judge=judged(model, made[:cases]) if len(made) >= cases else {},
    )


def report(
    arguments: argparse.Namespace,
    clips: int,
    cases: int,
    results: Sequence[Result],
    float_judge: dict[str, dict[str, float]],
) -> None:
    rows = [
        [one.sample, one.recipe, str(one.bins), common.plus_minus(one.psnr, 2), common.plus_minus(one.ssim, 4),
         common.plus_minus([1000 * value for value in one.temporal], 2),
         f"{one.executed} / {one.planned} ({100 * one.executed / one.planned:.0f} %)"]
        for one in results
    ]  # fmt: skip
    heads = ["model", "recipe", "bins", "PSNR dB", "SSIM", "temporal error ×1000", "integer kernels"]
    scores = []
    for sample, exact in float_judge.items():
        scores.append([sample, "float", *(f"{100 * exact[name]:.1f}" for name in MEASURES)])
        for one in results:
            if one.sample == sample and one.judge:
                maker = f"{one.recipe}, {one.bins} bins"
                scores.append([sample, maker, *(f"{100 * one.judge[name]:.1f}" for name in MEASURES)])
    notes = (
        "W8A8 bundles for ort-int8 against the float model, the same prompts and seeds "
        f"(cases 0 … {clips - 1}; the judge: 0 … {cases - 1}), 20 steps, both guidance branches; mean ± standard error "
        f"over {clips} clips. Temporal error is the mean absolute difference of frame-to-frame changes, pixels in "
        "[0, 1]. Integer kernels: planned linears of all bins that onnxruntime's optimised graphs run in integers."
    )
    tables: list[common.Table] = [
        ("Clips against float", heads, rows),
        (f"Judge, % right of {cases} clips", ["model", "made by", *MEASURES], scores),
    ]
    data = {"clips": clips, "cases": cases, "float_judge": float_judge, "results": [vars(one) for one in results]}
    common.write("quality", "Quality of the embedded samples", tables, data, notes, small=arguments.small)


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--clips", type=int, default=24, help="clips compared one by one (default 24)")
    made.add_argument("--cases", type=int, default=200, help="clips the judge sees (default 200)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {})
