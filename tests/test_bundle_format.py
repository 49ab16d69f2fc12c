"""A loader written from docs/bundle-format.md and what it links, without a line of this package, gives the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from tests import tiny_model
from vdq_export import export, load

Arrays = dict[str, np.ndarray[Any, Any]]


class Loader:
    """One guidance branch, one precision, no reuse. Raises ValueError for what the page says is to be refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (self.manifest["kind"], self.manifest["format"]) != ("vdq-export bundle", 1):
            raise ValueError("no bundle of format 1")
        for entry in self.manifest["files"]:
            self._check(entry)
        self.schedule = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
        self.sessions: dict[str, onnxruntime.InferenceSession] = {}

    def _check(self, entry: dict[str, Any]) -> None:
        place = PurePosixPath(entry["path"])
        if place.is_absolute() or ".." in place.parts or str(place) != entry["path"]:
            raise ValueError(f"{entry['path']} leaves the bundle")
        data = (self.folder / place).read_bytes()
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{entry['path']} is damaged")

    def __call__(self, t: float, inputs: Arrays) -> np.ndarray[Any, Any]:
        number = self._bin(t)
        values = self._ahead(number, t, inputs)
        return next(iter(self._run(self.schedule["bins"][number]["graph"], values, self.manifest["session"]).values()))

    def _bin(self, t: float) -> int:
        ranges = [one["when"]["t"] for one in self.schedule["bins"]]
        held = [number for number, (lo, hi) in enumerate(ranges) if lo <= t < hi or lo == hi == t]
        distances = [max(lo - t, t - hi, 0.0) for lo, hi in ranges]
        return held[0] if held else min(range(len(ranges)), key=lambda one: (distances[one], -ranges[one][0]))

    def _ahead(self, number: int, t: float, inputs: Arrays) -> Arrays:
        values = dict(inputs)
        for parts in self.schedule["hoisted"]:
            if number not in parts["bins"]:
                continue
            if parts["prompt"]:
                values |= self._run(parts["prompt"], values)
            rows = [row for row, one in enumerate(parts["timesteps"]) if abs(one - t) <= 1e-6 * max(1.0, abs(t))]
            if rows:
                table = load_file(self.folder / parts["tables"])
                values |= {name: array[rows[0]] for name, array in table.items()}
            elif parts["step"]:
                values |= self._run(parts["step"], values)
            if parts["mixed"]:
                values |= self._run(parts["mixed"], values)
        return values

    def _run(self, graph: str, values: Arrays, entries: dict[str, str] | None = None) -> Arrays:
        if graph not in self.sessions:
            options = onnxruntime.SessionOptions()
            if entries is None:  # ahead of the bins: docs/hoisting.md
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
                options.add_session_config_entry("session.disable_prepacking", "1")
            for key, value in (entries or {}).items():
                options.add_session_config_entry(key, value)
            self.sessions[graph] = onnxruntime.InferenceSession(
                str(self.folder / graph), options, providers=["CPUExecutionProvider"]
            )
        session = self.sessions[graph]
        names = [one.name for one in session.get_outputs()]
        fed = {one.name: values[one.name] for one in session.get_inputs()}
        return dict(zip(names, session.run(names, fed), strict=True))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("format") / "bundle"
    export(tiny_model.build(), recipe="static-minmax", tsw=2, out=out, page=False)
    return out


def test_a_loader_written_from_the_specification_gives_what_ours_gives(bundle: Path) -> None:
    mine = Loader(bundle)
    steps = [t for one in mine.schedule["bins"] for t in one["steps"]]
    assert len(mine.schedule["bins"]) == 2 and mine.schedule["hoisted"]
    with load(
        bundle, session_options={"session.disable_prepacking": "0"}
    ) as ours:  # docs/host-loop.md: to the last bit
        for t in (max(steps), min(steps), (steps[0] + steps[1]) / 2):  # rows of the table, and one that has none
            inputs = tiny_model.inputs(3, t)
            assert {one["name"] for one in mine.manifest["signature"]["inputs"]} == set(inputs)
            expected = ours(**inputs)
            wanted = expected if isinstance(expected, torch.Tensor) else expected.sample
            made = mine(t, {name: tensor.numpy() for name, tensor in inputs.items()})
            np.testing.assert_array_equal(made, wanted.numpy())


def test_it_refuses_what_the_specification_says(bundle: Path) -> None:
    plan = bundle / "plan.json"
    whole = plan.read_bytes()
    plan.write_bytes(whole.replace(b"static", b"dtatic", 1))  # of the same size
    try:
        with pytest.raises(ValueError, match=r"plan\.json is damaged"):
            Loader(bundle)
    finally:
        plan.write_bytes(whole)
