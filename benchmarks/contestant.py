"""One contestant of the speed benchmark in a process of its own, so that runs of several can alternate fairly.

`python -m benchmarks.contestant JSON`, JSON = {"kind", "path", "held_out", "threads", …}: loads, answers one line, then
answers each line of stdin: {"do": "run", "call": n, "repeat": r} -> seconds of r runs; {"do": "outputs", "path": p} ->
the outputs of all held-out calls in an .npz. Imports only what its kind needs: peers live in their own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.common import private_stdout, versions

Array = np.ndarray[Any, Any]
Calls = list[dict[str, Array]]
Run = Callable[[dict[str, Array]], Any]  # the output array


def read_calls(path: str) -> Calls:
    """The calls of an .npz file with keys "<call>/<input>", in order."""
    calls: dict[int, dict[str, Array]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            number, name = key.split("/")
            calls.setdefault(int(number), {})[name] = stored[key]
    return [calls[number] for number in sorted(calls)]


def onnxruntime_model(settings: Mapping[str, Any]) -> Run:
    """Any .onnx file in onnxruntime with all its optimisations; settings["options"]: session config entries."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = settings["threads"]
    options.log_severity_level = 3
    for key, value in settings.get("options", {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(settings["path"], options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def bundle(settings: Mapping[str, Any]) -> Run:
    """Our bundle through its runtime, as a pipeline would call it."""
    import vdq_export

    transformer = vdq_export.load(settings["path"], threads=settings["threads"])
    return lambda feeds: transformer(**feeds, return_dict=False)[0]


def openvino_model(settings: Mapping[str, Any]) -> Run:
    """An .onnx file in OpenVINO, float32, tuned for latency."""
    import openvino as ov

    core = ov.Core()
    return _compiled(core, core.read_model(settings["path"]), settings)


def nncf_model(settings: Mapping[str, Any]) -> Run:
    """The same after nncf.quantize on all calibration calls, with NNCF's transformer settings."""
    import nncf
    import openvino as ov

    core = ov.Core()
    calls = read_calls(settings["calibration"])
    quantized = nncf.quantize(
        core.read_model(settings["path"]),
        nncf.Dataset(calls),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    return _compiled(core, quantized, settings)


def _compiled(core: Any, model: Any, settings: Mapping[str, Any]) -> Run:
    config = {
        "INFERENCE_NUM_THREADS": settings["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else matmuls silently run in bfloat16 where the CPU has it
    }
    compiled = core.compile_model(model, "CPU", config)
    return lambda feeds: compiled(feeds)[0]


KINDS: dict[str, Callable[[Mapping[str, Any]], Run]] = {
    "onnxruntime": onnxruntime_model,
    "bundle": bundle,
    "openvino": openvino_model,
    "nncf": nncf_model,
}


def main() -> None:
    answer = private_stdout()
    settings = json.loads(sys.argv[1])
    start = time.perf_counter()
    run = KINDS[settings["kind"]](settings)
    answer({"load_seconds": time.perf_counter() - start, "versions": versions()})
    calls = read_calls(settings["held_out"])
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "outputs":
            np.savez(question["path"], *[run(call) for call in calls])
            answer({})
        else:
            answer({"seconds": [_timed(run, calls[question["call"]]) for _ in range(question["repeat"])]})


def _timed(run: Run, feeds: dict[str, Array]) -> float:
    start = time.perf_counter()
    run(feeds)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
