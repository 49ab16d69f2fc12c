"""The sample on the GPU: its clip against onnxruntime's of the same bundle, and what going to another bin costs."""

from __future__ import annotations

import gc
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vdq_export
from vdq_export import sources
from vdq_export.bundle_writer import BundleWriter
from vdq_export.compiler import finish, make_plan
from vdq_export.runtime.device import programs_of
from vdq_export.targets.cuda.lower import lower

SAMPLE = "sample:digits"
GOAL_DB = 45.0
CLIPS = 4


def export(out: Path, recipe: str = "static-asq") -> Path:
    """A bundle of the sample with four bins; without the store of finished work, which wants all of msgspec."""
    planned = make_plan(SAMPLE, target="cuda", isa="jit", recipe=recipe, tsw=4)
    with BundleWriter(out, force=True) as writer:
        finish(planned, writer)
    return out


def quality(bundle: Path, dtypes: tuple[str, ...] = ("float16", "bfloat16", "float32")) -> list[dict[str, Any]]:
    """PSNR of clips from the GPU against onnxruntime's, for each type of floats between kernels."""
    sampler: Any = sources.resolve(SAMPLE).sampler
    with vdq_export.load(bundle) as reference:
        expected = [np.asarray(sampler.generate(reference, case), np.float64) for case in range(CLIPS)]
    rows = []
    for dtype in dtypes:
        with vdq_export.load(bundle, device="cuda", dtype=dtype) as transformer:
            found = [np.asarray(sampler.generate(transformer, case), np.float64) for case in range(CLIPS)]
        rows.append({"dtype": dtype, "psnr_db": _psnr(expected, found), "goal": GOAL_DB})
    return rows


def _psnr(expected: list[Any], found: list[Any]) -> float:
    """Of all clips together; values lie in [0, 1]."""
    error = np.mean([np.mean((a - b) ** 2) for a, b in zip(expected, found, strict=True)])
    return float(-10 * np.log10(error))


def switching(bundle: Path, steps: int = 400) -> dict[str, Any]:
    """Milliseconds of steps that stay in their bin and of those that change it; captures: of CUDA graphs, in all."""
    opened = vdq_export.Bundle.open(bundle)
    (one,) = programs_of(opened).programs
    program = lower(bundle / one.graph, device="cuda").capture()
    feeds = {
        port.name: torch.randn(port.shape, device="cuda").to(port.dtype)
        if port.dtype.is_floating_point
        else torch.zeros(port.shape, dtype=port.dtype, device="cuda")
        for port in program.inputs
    }
    rows = [torch.tensor([row], device="cuda") for row in range(len(one.bins))]
    order = np.random.default_rng(0).integers(0, len(rows), steps)
    before = torch.cuda.memory_allocated()
    taken: dict[bool, list[float]] = {True: [], False: []}
    for place, row in enumerate(order):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        program({**feeds, "bin": rows[row]})
        end.record()
        torch.cuda.synchronize()
        if place:
            taken[bool(order[place - 1] != row)].append(begin.elapsed_time(end))
    captures = sum(isinstance(one, torch.cuda.CUDAGraph) for one in gc.get_objects())
    return {
        "same": statistics.median(taken[False]), "switch": statistics.median(taken[True]),
        "spread": statistics.stdev(taken[False]), "captures": captures, "grown": torch.cuda.memory_allocated() - before,
    }  # fmt: skip
