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
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from tests.staging import ROOT
from vdq_export.bundle import Bundle
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
    """What node.mjs made: the clip [C, F, H, W] in [0, 1], {t, bins, precision, milliseconds} of each step, and how
    often what runs ahead of the bins did: {prompt, step, mixed, rows}.
    """

    clip: Array
    steps: list[dict[str, Any]]
    runs: dict[str, int]


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
        told = {name: json.loads(text) for name, text in file.metadata().items()}
        return Clip(file.get_tensor("clip"), **told)


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


def hoisted_case(start: Array, prompts: dict[str, dict[str, Array]]) -> bytes:
    """The case of a clip of tests/hoisted_bundle.py: the latent it starts from, and the prompt inputs by branch."""
    tensors = {f"{branch}/{name}": value for branch, given in prompts.items() for name, value in given.items()}
    metadata = {"latent": "hidden_states", "branches": " ".join(prompts), "number": "0", "text": "parts"}
    return save({"latent": start, **tensors}, metadata)
