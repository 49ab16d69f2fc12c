"""A quantized peer that answers calls: `python -m benchmarks.fidelity.peer_process JSON`, in the peer's environment.

JSON: an entry of peers.PEERS with "folder" (plain.onnx, module/, calls.npz), "work" (an empty one), "kept" (patterns of
modules left in float) and "float_nodes" (the same as node names of plain.onnx). The first line of stdout says which
versions it runs with, or the error it ended with; each line of stdin is then {"inputs": {name: packed}}. Imports only
what its kind needs.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import private_stdout, versions
from benchmarks.contestant import read_calls

Array = np.ndarray[Any, Any]
Run = Callable[[dict[str, Array]], Array]


def quantize_static(settings: Mapping[str, Any]) -> Run:
    """onnxruntime's own quantizer, then onnxruntime."""
    import onnxruntime as ort

    from benchmarks import peer_static

    folder, work = Path(settings["folder"]), Path(settings["work"])
    peer_static.preprocess(folder / "plain.onnx", work / "preprocessed.onnx")
    calls = read_calls(str(folder / "calls.npz"))
    peer_static.quantize(
        work / "preprocessed.onnx",
        work / "quantized.onnx",
        calls,
        method=settings["method"],
        float_nodes=settings["float_nodes"],
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(work / "quantized.onnx", options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)[0]


def nncf(settings: Mapping[str, Any]) -> Run:
    """nncf.quantize with its transformer settings, in OpenVINO with float32 where it does not use integers."""
    import nncf
    import openvino as ov

    folder, core = Path(settings["folder"]), ov.Core()
    calls = read_calls(str(folder / "calls.npz"))
    more: dict[str, Any] = {}
    if settings["float_nodes"]:
        more["ignored_scope"] = nncf.IgnoredScope(names=settings["float_nodes"], validate=False)
    quantized = nncf.quantize(
        core.read_model(folder / "plain.onnx"),
        nncf.Dataset(calls),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        **more,
    )
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(quantized, "CPU", config)
    return lambda feeds: compiled(feeds)[0]


def modelopt(settings: Mapping[str, Any]) -> Run:
    """Model Optimizer's torch path: the module with its fake quantizers, exact integers in float arithmetic."""
    import copy

    import modelopt.torch.quantization as mtq
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    folder = Path(settings["folder"])
    # Not from_pretrained: without accelerate it refuses modules that keep some layers in float32.
    module = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder / "module"))
    module.load_state_dict(load_file(next((folder / "module").glob("*.safetensors"))))
    module.eval()
    config = copy.deepcopy(getattr(mtq, settings["config"]))
    for pattern in settings["kept"]:
        config["quant_cfg"].append({"quantizer_name": f"*{pattern}*", "enable": False})
    if "alpha" in settings:
        config["algorithm"] = {"method": "smoothquant", "alpha": settings["alpha"]}
    calls = read_calls(str(folder / "calls.npz"))

    def run(feeds: dict[str, Array]) -> Array:
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value.copy()) for name, value in feeds.items()}
            output: Array = module(**tensors, return_dict=False)[0].numpy()
        return output

    mtq.quantize(module, config, lambda _: [run(call) for call in calls])
    return run


KINDS: dict[str, Callable[[Mapping[str, Any]], Run]] = {
    "quantize_static": quantize_static,
    "nncf": nncf,
    "modelopt": modelopt,
}


def main() -> None:
    answer = private_stdout()
    settings = json.loads(sys.argv[1])
    try:
        run = KINDS[settings["kind"]](settings)
    except Exception as error:  # whatever it is: the table says it
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
    answer({"versions": versions()})
    for line in sys.stdin:
        feeds = {name: unpack(packed) for name, packed in json.loads(line)["inputs"].items()}
        answer({"output": pack(np.asarray(run(feeds)))})


def pack(array: Array) -> list[Any]:
    """[dtype, shape, bytes in base64]: JSON for an array."""
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def unpack(packed: list[Any]) -> Array:
    dtype, shape, data = packed
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)


if __name__ == "__main__":
    main()
