"""verify --device cuda: do the fused kernels compute what the bundle's graphs say? Per bin, and on whole clips.

As verify.py does for the HTP: onnxruntime runs each bin's graph exactly, the device its program, both on inputs
of the bin's own first trajectory. `cuda-torch` runs the same programs in plain torch on the CPU: it checks what was
rewritten, not the kernels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch

from vdq_export import float_model, ort
from vdq_export.bundle import Bundle
from vdq_export.devices.checks import Noise, bin_failures, calls_by_bin, inputs_of, verdict
from vdq_export.graph import OUTPUT, Graph
from vdq_export.model import Model, Step
from vdq_export.progress import Reporter
from vdq_export.report.data import LayerQuality, VerifyReport
from vdq_export.report.device import DeviceBin, DeviceReport
from vdq_export.runtime import load
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.device import DeviceAhead, DeviceEngine, checked
from vdq_export.verify import Clips, count_kernels


def verify_gpu(
    bundle: Bundle,
    model: Model | str | None = None,
    *,
    device: Literal["cuda", "cuda-torch"] = "cuda",
    dtype: str = "float16",
    steps: int = 5,
    clips: int = 1,
    reporter: Reporter | None = None,
) -> VerifyReport:
    """Measure `bundle` there. dtype: of the floats between kernels; steps: calls of each bin; clips: whole ones.

    Raises ModelError for a model the bundle was not made from or without steps for a bin, BundleError for a bundle
    without programs, MissingToolError without a GPU.
    """
    reporter = reporter or Reporter()
    on = checked("cuda" if device == "cuda" else "cpu", dtype)
    model = float_model.find(bundle, model)
    calls = calls_by_bin(bundle, model, steps)
    found: list[DeviceBin] = []
    layers: list[LayerQuality] = []
    engine = DeviceEngine(bundle, bundle.schedule, DeviceAhead(bundle, bundle.schedule, on), on, dtype)
    with reporter.stage("bins on the device") as advance, closing(engine):
        for index in sorted(calls):
            measured, worst = _measure(bundle, model, index, calls[index], engine)
            found.append(measured)
            layers.append(LayerQuality(layer=OUTPUT, bin=index, sqnr_db=measured.device_db or 0.0, worst_step=worst))
            advance(len(found), len(calls))
    made, seconds = _clips(bundle, model, on, dtype, 0 if any(map(bin_failures, found)) else clips, reporter)
    told = DeviceReport(
        device=device,
        arch=_architecture(on),
        tool=_tool(on),
        bins=tuple(found),
        clips=len(made.reference),
        clip_seconds=seconds,
    )
    return verdict(bundle, model, told, count_kernels(bundle)[0], layers, made)


def _measure(
    bundle: Bundle, model: Model, index: int, calls: Sequence[Step], engine: DeviceEngine
) -> tuple[DeviceBin, float]:
    """(the bin as measured, t of its worst call)"""
    exact, output = ort.session(Graph.load(bundle.graph_path(index)), exact=True), bundle.manifest.signature.outputs[0]
    noise, start, ready = Noise(), time.perf_counter(), 0.0
    with closing(Ahead(bundle)) as ahead:
        for call in calls:
            inputs = inputs_of(bundle, call)
            if not noise.seconds:  # the first call compiles
                engine.run(index, call["branch"], inputs, output.name)
                ready = time.perf_counter() - start
            begin = time.perf_counter()
            device = engine.run(index, call["branch"], inputs, output.name)
            noise.seconds.append(time.perf_counter() - begin)
            reference = model(**call["inputs"]).numpy()
            (expected,) = exact.run([output.name], ahead.arrays(index, exact, inputs))
            noise.add(reference, expected, device, call["t"])
    figures: dict[str, Any] = noise.figures()
    return DeviceBin(bin=index, steps=len(calls), compile_seconds=ready, **figures), noise.worst[1]


def _clips(
    bundle: Bundle, model: Model, on: torch.device, dtype: str, count: int, reporter: Reporter
) -> tuple[Clips, float | None]:
    """(cases 0 … count−1 by the float model and on the device, seconds per clip there)"""
    made, seconds = Clips(), []
    if model.sampler is None or not count:
        return made, None
    with (
        reporter.stage("clips on the device") as advance,
        load(bundle.path, device=on.type, dtype=dtype) as transformer,
    ):
        for case in range(count):
            made.reference.append(model.clip(model.module, case))
            begin = time.perf_counter()
            made.quantized.append(model.clip(transformer, case))
            seconds.append(time.perf_counter() - begin)
            advance(case + 1, count)
    return made, float(np.mean(seconds))


def _architecture(on: torch.device) -> str:
    if on.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(on)
    return f"sm_{major}{minor}"


def _tool(on: torch.device) -> str:
    found = f"torch {torch.__version__}"
    return f"{found}, triton {import_module('triton').__version__}" if on.type == "cuda" else found
