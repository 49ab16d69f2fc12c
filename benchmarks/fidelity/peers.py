"""Other quantizers on the same model and calibration calls, each in a process of its own that answers calls.

They get what their users would have: torch.onnx.export's default float model (Model Optimizer: the torch module) and
every call of the calibration trajectories. Then the sample's own sampler runs the same cases through them.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks import common
from benchmarks import peers as environment
from benchmarks.fidelity.peer_process import pack, unpack
from benchmarks.fidelity.setting import FOLDER, Denoiser, Setting
from vdq_export import recipe as recipes
from vdq_export.errors import VdqError
from vdq_export.experts import Experts
from vdq_export.model import Model

# Settings of peer_process.py; environment "own": this one (quantize_static is onnxruntime's).
PEERS: dict[str, dict[str, Any]] = {
    "quantize_static": {"kind": "quantize_static", "environment": "own", "same": False, "method": "MinMax"},
    "quantize_static same": {"kind": "quantize_static", "environment": "own", "same": True, "method": "MinMax"},
    "quantize_static percentile": {
        "kind": "quantize_static", "environment": "own", "same": True, "method": "Percentile"
    },
    "nncf": {"kind": "nncf", "environment": "peers", "same": False},
    "nncf same": {"kind": "nncf", "environment": "peers", "same": True},
    "modelopt int8": {"kind": "modelopt", "environment": "peers", "same": True, "config": "INT8_DEFAULT_CFG"},
    "modelopt smoothquant": {
        "kind": "modelopt", "environment": "peers", "same": True, "config": "INT8_SMOOTHQUANT_CFG", "alpha": 1.0
    },
    "modelopt smoothquant 0.5": {
        "kind": "modelopt", "environment": "peers", "same": True, "config": "INT8_SMOOTHQUANT_CFG", "alpha": 0.5
    },
}  # fmt: skip
OPERATORS = ("MatMul", "Gemm", "Conv")
ATTENTION = "scaled_dot_product_attention"


def identity(name: str) -> dict[str, Any]:
    """What a peer's numbers follow from: its settings and the version it is pinned to."""
    own = PEERS[name]["environment"] == "own"
    pinned = common.versions()["onnxruntime"] if own else environment.REQUIREMENTS.read_text()
    return {**PEERS[name], "versions": pinned}


@contextmanager
def denoiser(name: str, setting: Setting) -> Iterator[tuple[Denoiser, dict[str, str]]]:
    """(the quantized model as a denoiser, versions it runs with). Raises PeerError when the peer fails."""
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        remote, versions = {}, dict[str, str]()
        for expert, network in setting.model.networks():
            folder = _prepare(setting, expert, network)
            child = _start(PEERS[name], folder, work / (expert or "network"))
            stack.callback(child.close)
            remote[expert], versions = _Remote(child), child.hello["versions"]
        module = setting.model.module
        if isinstance(module, Experts):
            experts: Experts = module
            yield lambda **inputs: remote[experts.serving(float(inputs["timestep"][0])).name](**inputs), versions
        else:
            yield remote[""], versions


class PeerError(VdqError):
    """A peer's process ended before it answered."""


class _Remote:
    """A denoiser in another process."""

    def __init__(self, child: common.Child) -> None:
        self._child = child

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        packed = {name: pack(tensor.numpy()) for name, tensor in inputs.items()}
        return torch.from_numpy(unpack(self._child.ask(inputs=packed)["output"]).copy())


def _start(settings: Mapping[str, Any], prepared: Path, work: Path) -> common.Child:
    """work: a folder for the peer's own files, made here."""
    work.mkdir()
    kept = _kept() if settings["same"] else []
    nodes = json.loads((prepared / "float_nodes.json").read_text()) if settings["same"] else []
    more = {"folder": str(prepared), "work": str(work), "kept": kept, "float_nodes": nodes}
    python = sys.executable if settings["environment"] == "own" else str(environment.python())
    try:
        child = common.Child("fidelity.peer_process", {**settings, **more}, 1, python)
    except SystemExit as error:
        raise PeerError(str(error)) from error
    if "error" in child.hello:
        raise PeerError(child.hello["error"])
    return child


def _kept() -> list[str]:
    """Modules that our recipes leave in float."""
    return [rule.match for rule in recipes.load("static-minmax").keep_float]


def _prepare(setting: Setting, expert: str, network: Model) -> Path:
    """A folder with calls.npz, plain.onnx (torch.onnx.export's defaults), module/ and float_nodes.json: the nodes of
    plain.onnx that do what we leave in float. Made once."""
    cases = f"{setting.first_calibration}+{setting.calibration}"
    folder = FOLDER / "peers" / f"{setting.name}-{cases}{f'-{expert}' if expert else ''}"
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    calls = [step["inputs"] for trajectory in network.iter_trajectories() for step in trajectory]
    arrays = {f"{i}/{name}": tensor.numpy() for i, call in enumerate(calls) for name, tensor in call.items()}
    np.savez(partial / "calls.npz", allow_pickle=False, **arrays)
    network.module.save_pretrained(partial / "module")  # type: ignore[operator]
    with torch.no_grad():
        program = torch.onnx.export(network.module, (), kwargs=dict(network.example_inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(partial / "plain.onnx"))
    graph, kept = onnx.load(partial / "plain.onnx", load_external_data=False).graph, _kept()
    nodes = [n.name for n in graph.node if n.op_type in OPERATORS and _is_float(_scopes(n), kept)]
    (partial / "float_nodes.json").write_text(json.dumps(nodes))
    partial.rename(folder)
    return folder


def _scopes(node: onnx.NodeProto) -> list[str]:
    """The module paths around a node and its own name, as the exporter noted them."""
    noted = {entry.key: entry.value for entry in node.metadata_props}["pkg.torch.onnx.name_scopes"]
    return [part.strip("' ") for part in noted.strip("[]").split(",")]


def _is_float(scopes: list[str], kept: list[str]) -> bool:
    module, own = scopes[-2], scopes[-1]
    return own.startswith(ATTENTION) or any(fnmatchcase(module, pattern) for pattern in kept)
