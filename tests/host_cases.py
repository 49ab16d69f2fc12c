"""What the tests of the host loop share: Node and Chromium, where they are, and bundles for them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.numpy import save

from tests.staging import ROOT
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.plan import Bin
from vdq_export.schedule import Schedule

Array = np.ndarray[Any, Any]
HOST, LOOP = ROOT / "tests" / "host", ROOT / "vdq_export" / "host"
MODULES = HOST / "node_modules"
NODE = shutil.which("node") or ""
CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), "")

needs_node = pytest.mark.skipif(not NODE, reason="no node on PATH")
needs_modules = pytest.mark.skipif(
    not (NODE and (MODULES / "onnxruntime-node").is_dir()), reason="`npm ci` has not been run in tests/host"
)
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and NODE and (MODULES / "playwright-core").is_dir()),
    reason="no chromium on PATH, or `npm ci` has not been run in tests/host",
)


class Clip(NamedTuple):
    """What node.mjs made: the clip [C, F, H, W] in [0, 1], and {t, bins, precision, milliseconds} of each step."""

    clip: Array
    steps: list[dict[str, Any]]


def node(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with Node; its working folder is the one with the runtimes."""
    command = [NODE, str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=HOST, capture_output=True, text=True, check=False, timeout=300)


def generate(bundle: Path, case: bytes, folder: Path) -> Clip:
    """Make a clip with node.mjs."""
    (folder / "case.safetensors").write_bytes(case)
    out = folder / "clip.safetensors"
    done = node(LOOP / "node.mjs", bundle, folder / "case.safetensors", out)
    assert (done.returncode, done.stderr) == (0, "")
    with safe_open(out, "np") as file:
        return Clip(file.get_tensor("clip"), json.loads(file.metadata()["steps"]))


def with_policy(bundle: Path, text: str, out: Path) -> Path:
    """A copy of a bundle under another policy, as a host that cannot be told one needs it."""
    return with_schedule(bundle, Bundle.open(bundle).schedule.with_policy(text), out)


def with_schedule(bundle: Path, changed: Schedule, out: Path) -> Path:
    """A copy of a bundle with another schedule.json."""
    shutil.copytree(bundle, out)
    schedule = changed.to_json()
    (out / "schedule.json").write_bytes(schedule)
    manifest = json.loads((out / "manifest.json").read_bytes())
    entry = next(one for one in manifest["files"] if one["path"] == "schedule.json")
    entry |= {"size": len(schedule), "sha256": hashlib.sha256(schedule).hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


def made_once(place: Path, make: Callable[[Path], object]) -> Path:
    """`place`, made by the first of the test processes that asks for it."""
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            make(place)
    return place


# -- a bundle whose graphs get a timestep's values from a table ---------------------------------------------------

LEVELS = (1.0, 0.75, 0.5, 0.25)  # of flow-euler with four steps and shift 1
GAINS = (0.5, 0.25)


class TableBundle(NamedTuple):
    """y = x · gain(bin) + shift(t) + context: the shift [1, 3] is an input that tables/steps.safetensors supplies."""

    bundle: Bundle
    shifts: Array  # [4, 1, 3] in the order of the schedule's steps

    def clip(self, start: Array, contexts: dict[str, Array], guidance: float) -> Array:
        """What flow-euler makes of it, as a clip [F, 3]."""
        x = start.astype(np.float32)
        for step, level in enumerate(LEVELS):
            gain = np.float32(GAINS[0 if level > 0.5 else 1])
            c, u = (x * gain + self.shifts[step] + contexts[name] for name in ("cond", "uncond"))
            x = x + np.float32(-0.25) * (u + np.float32(guidance) * (c - u))
        return np.clip(x / 2 + np.float32(0.5), 0, 1)[0]


def with_tables(out: Path, guidance: float = 2.0, rows: int = 4) -> TableBundle:
    """rows: of the table; fewer than four make it lack some."""
    shifts = np.random.default_rng(3).standard_normal((rows, 1, 3)).astype(np.float32)
    edges = ((0.6, 1.0), (0.1, 0.6))
    with BundleWriter(out) as writer:
        bins, paths = [], []
        for index, (lo, hi) in enumerate(edges):
            inside = tuple(1000 * level for level in LEVELS if lo < level <= hi)
            bins.append(Bin(index=index, t=(1000 * lo, 1000 * hi), steps=inside[: max(0, rows - 2 * index)]))
            paths.append(writer.add_graph(f"body.bin{index:02d}", _table_graph(GAINS[index])))
        writer.add_file("tables/steps.safetensors", save({"shift": shifts}))
        manifest = Manifest(
            model=ModelIdentity(name="tables", weight_hash="0"),
            target="test",
            isa="any",
            signature=signature_of(_table_graph(1.0), "timestep"),
        )
        sampler = {"name": "flow-euler", "steps": 4, "shift": 1.0, "guidance": guidance}
        bundle = writer.commit(manifest, Schedule.from_bins(bins, paths, sampler=sampler))
    return TableBundle(bundle, shifts)


def _table_graph(gain: float) -> onnx.ModelProto:
    shapes = {"hidden_states": [1, 2, 3], "timestep": [1], "shift": [1, 3], "context": [1, 2, 3]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Mul", ["hidden_states", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["shifted"]),
        helper.make_node("Mul", ["timestep", "zero"], ["nothing"]),  # the graph has to use it
        helper.make_node("Add", ["shifted", "nothing"], ["same"]),
        helper.make_node("Add", ["same", "context"], ["sample"]),
    ]
    constants = [
        helper.make_tensor("gain", TensorProto.FLOAT, [], [gain]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
    ]
    output = helper.make_tensor_value_info("sample", TensorProto.FLOAT, [1, 2, 3])
    made = helper.make_graph(nodes, "tables", inputs, [output], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def table_case(start: Array, contexts: dict[str, Array]) -> bytes:
    """The case of a clip that starts from `start` [1, F, 3]."""
    tensors = {"latent": start, **{f"{branch}/context": value for branch, value in contexts.items()}}
    return save(tensors, {"latent": "hidden_states", "branches": " ".join(contexts), "number": "0", "text": "tables"})
