"""Runs in .venv-aimet: what AIMET makes of encodings, one JSON object a line.

    python tests/aimet/check.py FOLDER...

A folder holds qdq.onnx, float.onnx and encodings.json.
read: tensors whose numbers AIMET, reading the Q/DQ nodes itself, gets otherwise than the file has them (2.0.0 only).
wrong: tensors that AIMET holds with another offset, axis or number of bits after load_encodings_to_sim(); scale_error:
the largest relative one. uncovered: tensors AIMET would quantize and the file says nothing of. run: largest difference
between the outputs of the Q/DQ graph and of the one AIMET makes of the float graph and the file.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

logging.disable(logging.WARNING)

from aimet_onnx import quantsim  # noqa: E402  (its loggers are configured at import)
from aimet_onnx._encoding import AffineEncoding, EncodingBase  # noqa: E402

CONFIG = Path(__file__).with_name("every_tensor.json")  # AIMET's own ones fuse MatMul and Add, whose middle we name


def check(folder: str) -> None:
    qdq, floated, encodings = (str(Path(folder) / name) for name in ("qdq.onnx", "float.onnx", "encodings.json"))
    held = json.loads(Path(encodings).read_bytes())
    entries = entries_of(held)
    found: dict[str, Any] = {"version": held["version"], "tensors": len(entries)}
    found["aimet"] = metadata.version("aimet-onnx")
    if held["version"] == "2.0.0":
        found["read"] = read(qdq, entries)
    found |= load(floated, encodings, held, entries)
    # encodings_to_onnx_qdq() cannot tell the axis of blocks in 1.0.0, which does not name it.
    flat_blocks = any(isinstance(one, dict) and one.get("enc_type") == "PER_BLOCK" for one in entries.values())
    found["run"] = None if flat_blocks else run(qdq, floated, encodings)
    print(json.dumps(found))


def entries_of(held: dict[str, Any]) -> dict[str, Any]:
    """Tensor name -> what the file says of it."""
    if "encodings" in held:
        return {one["name"]: one for one in held["encodings"]}
    parts = [held["param_encodings"], held["activation_encodings"]]
    if isinstance(parts[0], dict):
        return parts[0] | parts[1]
    return {one["name"]: one for part in parts for one in part}


def read(qdq: str, entries: dict[str, Any]) -> dict[str, Any]:
    """AIMET takes the Q/DQ nodes out by itself; a second pair on one value it names otherwise."""
    theirs = {one["name"]: one for one in quantsim._remove_onnx_qdq_nodes(onnx.load(qdq))}
    shared = entries.keys() & theirs.keys()
    differing = [name for name in shared if not same(entries[name], theirs[name])]
    return {"shared": len(shared), "differing": sorted(differing), "theirs_only": sorted(theirs.keys() - shared)}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    scales = [np.asarray(one["y_scale"], np.float64) for one in (ours, theirs)]
    zeros = [np.asarray(one.get("y_zero_point", 0), np.int64) for one in (ours, theirs)]
    exact = ours["output_dtype"] == theirs["output_dtype"] and ours.get("axis") == theirs.get("axis")
    return exact and near(*scales) and not np.any(zeros[0] - zeros[1])


def load(floated: str, encodings: str, held: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    model = onnx.load(floated)
    sim = quantsim.QuantizationSimModel(
        model, param_type="int8", activation_type="int16", config_file=str(CONFIG), providers=["CPUExecutionProvider"]
    )
    wanted = {
        name
        for name, one in sim.qc_quantize_op_dict.items()
        if one.enabled and one.data_type == quantsim.QuantizationDataType.int
    }
    missing = entries.keys() - sim.qc_quantize_op_dict.keys()
    constants = {tensor.name for tensor in model.graph.initializer}
    # Outputs of operators that only move data have no quantizer, or none that is on, where their encoding is their
    # input's; AIMET adds them itself for the older versions.
    quantsim._add_missing_quantizers(sim, missing & constants, missing - constants)
    # Operands of one Concat share a quantizer until each has its own; so does AIMET when it reads Q/DQ nodes.
    sim.set_quantizers({name: one._copy() for name, one in sim.qc_quantize_op_dict.items()})
    for name in entries:
        sim.qc_quantize_op_dict[name].enabled = True
    quantsim.load_encodings_to_sim(sim, encodings, strict=False)
    wrong, error = [], 0.0
    for name, entry in entries.items():
        quantizer = sim.qc_quantize_op_dict[name]
        disabled = not quantizer.enabled
        quantizer.enabled = True  # int32 biases are kept, but not simulated
        loaded = EncodingBase.from_quantizer(quantizer)
        if not isinstance(loaded, AffineEncoding) or (disabled and loaded.bitwidth < 32):
            wrong.append(name)
            continue
        scale, offset, bits = numbers(entry)
        axis = entry.get("axis") if isinstance(entry, dict) else None
        held_scale, held_offset = (flat(entry, values) for values in (loaded.scale, loaded.to_unsigned().offset))
        error = max(error, float(np.max(np.abs(held_scale / scale - 1))))
        misplaced = axis is not None and axis not in (loaded.channel_axis, loaded.block_axis)
        if misplaced or loaded.bitwidth != bits or np.any(held_offset != offset):
            wrong.append(name)
    return {"wrong": wrong, "scale_error": error, "uncovered": sorted(wanted - entries.keys())}


def flat(entry: Any, values: Any) -> Any:
    """As the file lists them: 1.0.0 has blocks with the output channels first."""
    blocks = isinstance(entry, dict) and entry.get("enc_type") == "PER_BLOCK"
    return (values.T if blocks else values).reshape(-1)


def numbers(entry: Any) -> tuple[Any, Any, int]:
    """(scales, offsets in unsigned terms, bits) of one entry of any version, flat."""
    if isinstance(entry, list):
        return np.array([e["scale"] for e in entry]), np.array([e["offset"] for e in entry]), entry[0]["bitwidth"]
    if "bw" in entry:
        return np.array(entry["scale"]), np.array(entry["offset"]), entry["bw"]
    bits = int(entry["output_dtype"].split("int")[1])
    scale = np.asarray(entry["y_scale"], np.float64).reshape(-1)
    shift = 0 if entry["output_dtype"].startswith("u") else 2 ** (bits - 1)
    return scale, np.broadcast_to(-np.asarray(entry.get("y_zero_point", 0)).reshape(-1) - shift, scale.shape), bits


def run(qdq: str, floated: str, encodings: str) -> float:
    theirs = quantsim.encodings_to_onnx_qdq(
        onnx.load(floated), encodings, prequantize_constants=True, force_activation_as=None
    )
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [ort.InferenceSession(one, settings) for one in (qdq, theirs.SerializeToString())]
    random = np.random.default_rng(0)
    feeds = {i.name: random.standard_normal(i.shape).astype(np.float32) for i in sessions[0].get_inputs()}
    outputs = [session.run(None, feeds) for session in sessions]
    return max(float(np.abs(a - b).max()) for a, b in zip(*outputs, strict=True))


def near(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool(np.all(np.abs(a / b - 1) <= 1e-7))


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        check(folder)
