"""Calibration by segments: the file observe() would have written, also after a kill, with little in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import calib_cases as cases
from tests import tiny_model
from vdq_export import pipeline
from vdq_export.calib import blocks
from vdq_export.calib.blocks import is_too_large, observe_blocks
from vdq_export.calib.observe import observe
from vdq_export.compiler import export
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError, ModelError
from vdq_export.graph import Graph
from vdq_export.model import Model, Step
from vdq_export.work.store import WorkStore

BUDGET = 20_000


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    made = traced.copy()
    pipeline.run_passes(made, pipeline.canonical("ort-int8"), PassContext())
    return made


@pytest.fixture(scope="module")
def whole(canonical: Graph, tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    place = tmp_path_factory.mktemp("whole") / "record.safetensors"
    observe(canonical, tiny, threads=1).save(place)
    return place.read_bytes()


def by_blocks(graph: Graph, model: Model, folder: Path, **settings: Any) -> bytes:
    place = folder / "record.safetensors"
    with WorkStore(folder / "work") as store:
        observe_blocks(graph, model, store, threads=1, **{"budget": BUDGET, **settings}).save(place)
    return place.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"budget": 1}, {"budget": 10**9}, {"limit": 10_000}], ids=str)
def test_the_file_is_the_one_of_the_whole_graph(
    canonical: Graph, tiny: Model, whole: bytes, tmp_path: Path, settings: dict[str, int]
) -> None:
    assert by_blocks(canonical, tiny, tmp_path, **settings) == whole


def test_linears_and_attention_that_read_inputs_of_the_graph(tmp_path: Path) -> None:
    model = cases.model()
    observe(cases.graph(), model, threads=1).save(tmp_path / "whole.safetensors")
    assert by_blocks(cases.graph(), model, tmp_path, budget=1) == (tmp_path / "whole.safetensors").read_bytes()


def test_a_finished_record_is_found_and_what_crossed_is_gone(
    canonical: Graph, tiny: Model, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert by_blocks(canonical, tiny, tmp_path) == whole
    stored = [place.stat().st_size for place in (tmp_path / "work").rglob("*") if place.is_file()]
    inputs = sum(t.nbytes for run in tiny.iter_trajectories() for step in run for t in step["inputs"].values())
    assert sum(stored) < 2.5 * len(whole) + inputs, "the record, its values once more, and the inputs"
    monkeypatch.setattr(blocks, "Running", None)
    assert by_blocks(canonical, tiny, tmp_path) == whole


def test_what_depends_on_the_prompt_alone_crosses_once(tmp_path: Path, canonical: Graph, tiny: Model) -> None:
    """Calls that get the same array from an earlier segment share one on disk."""
    same = [[{**step, "inputs": dict(tiny_model.inputs(1, step["t"]))} for step in tiny_model.trajectory(0)]]
    model = Model(tiny.module, tiny.example_inputs, same, name="tiny")
    kept = dict[str, int]()
    original = WorkStore.put

    def counted(self: WorkStore, key: str, data: bytes) -> None:
        kept[key] = kept.get(key, 0) + 1
        original(self, key, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkStore, "put", counted)
        by_blocks(canonical, model, tmp_path)
    assert set(kept.values()) == {1}


class Dies(Exception):
    pass


@pytest.mark.parametrize("after", [3, 20, 60])
def test_interrupted_anywhere_it_goes_on_and_ends_in_the_same_file(
    canonical: Graph, tiny: Model, whole: bytes, tmp_path: Path, after: int
) -> None:
    calls = 0

    def stop(done: int, total: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            raise Dies

    with pytest.raises(Dies):
        by_blocks(canonical, tiny, tmp_path, progress=stop)
    again = list[int]()
    assert by_blocks(canonical, tiny, tmp_path, progress=lambda done, total: again.append(done)) == whole
    everything = list[int]()
    by_blocks(canonical, tiny, tmp_path / "fresh", progress=lambda done, total: everything.append(done))
    assert len(again) + after - len(everything) < 13, "no more than the trajectory it was at is run again"


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from tests import tiny_model, test_calib_blocks as test
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.trace import trace
model = tiny_model.build()
graph = trace(model)
pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
calls = 0
def tick(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
test.by_blocks(graph, model, Path(sys.argv[1]), progress=tick)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_killed_it_goes_on_and_ends_in_the_same_file(
    canonical: Graph, tiny: Model, whole: bytes, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), "31"], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert by_blocks(canonical, tiny, tmp_path) == whole


class Keyed:
    """Trajectories that know what they depend on; counts how often each is made."""

    def __init__(self) -> None:
        self.made = [0, 0]

    def keys(self) -> tuple[str, ...]:
        return ("first", "second")

    def __getitem__(self, number: int) -> Any:
        self.made[number] += 1
        return tiny_model.trajectory(number)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(2))


def test_trajectories_that_have_keys_are_made_once(canonical: Graph, tiny: Model, whole: bytes, tmp_path: Path) -> None:
    keyed = Keyed()
    model = Model(tiny.module, tiny.example_inputs, keyed, name="tiny")

    def stop(done: int, total: int | None) -> None:
        raise Dies

    with pytest.raises(Dies):
        by_blocks(canonical, model, tmp_path, progress=stop)
    assert by_blocks(canonical, model, tmp_path) == whole and keyed.made == [1, 1]


def test_nan_names_layer_and_timestep(tmp_path: Path) -> None:
    def spoil(step: Step) -> None:
        if step["t"] < 300 and step["branch"] == "uncond":
            step["inputs"]["x"][0, 2, 3] = float("nan")

    with pytest.raises(CalibrationError, match=r"input of attn.to_q, .* at timestep 240 \(uncond\)"):
        by_blocks(cases.graph(), cases.model([cases.steps(change=spoil)]), tmp_path, budget=1)


def test_nan_that_no_linear_reads_is_found_in_the_output(tmp_path: Path) -> None:
    arrays = cases.weights()
    arrays["attn.to_o.bias"][0] = np.inf
    with pytest.raises(CalibrationError, match="output out at timestep 1000"):
        by_blocks(cases.graph(arrays), cases.model(), tmp_path, budget=1)


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    made = cases.model()
    made.trajectories = [cases.steps(change=lambda s: s["inputs"].update(x=torch.zeros(1, 3, cases.WIDTH)))]
    with pytest.raises(ModelError, match=r"step 0: input 'x' is float32 \[1, 3, 6\]"):
        by_blocks(cases.graph(), made, tmp_path, budget=1)
    with pytest.raises(CalibrationError, match="no trajectories"):
        by_blocks(cases.graph(), cases.model([]), tmp_path)


def test_a_provider_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no CUDAExecutionProvider here"):
        by_blocks(cases.graph(), cases.model(), tmp_path, provider="CUDAExecutionProvider")


def test_export_by_blocks_is_the_same_bundle(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    files = []
    for name, choice in (("whole", False), ("blocks", True)):
        settings: dict[str, Any] = {"traced": {"": traced.copy()}, "recipe": "static-minmax", "workers": 1}
        made = export(tiny, out=tmp_path / name, by_blocks=choice, **settings).path
        files.append({str(f.relative_to(made)): f.read_bytes() for f in sorted(made.rglob("*")) if f.is_file()})
    assert files[0] == files[1] and len(files[0]) > 4


class Denoised:
    """Trajectories that `network` makes, as those of a folder are."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __iter__(self) -> Iterator[Any]:
        latent, steps = tiny_model.inputs(1, 1000.0)["hidden_states"], list[Step]()
        for t in (1000.0, 500.0):
            given = {**tiny_model.inputs(1, t), "hidden_states": latent}
            steps.append({"t": t, "branch": "cond", "inputs": given})
            latent = latent - 0.1 * self.network(**given)
        yield steps


def unloadable(**inputs: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the whole network was loaded")


def test_a_network_that_does_not_fit_denoises_by_segments(
    canonical: Graph, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = next(iter(Denoised(tiny)))[1]["inputs"]["hidden_states"]
    model = Model(tiny.module, tiny.example_inputs, Denoised(unloadable), name="tiny")
    with pytest.raises(CalibrationError, match="room on disk"):
        blocks.calibrate(canonical, model, None)
    monkeypatch.setattr(blocks, "is_too_large", lambda graph: True)
    with WorkStore(tmp_path / "work") as store:
        record = blocks.calibrate(canonical, model, store)
    assert record.calls == 2 and record.constant_inputs == ("encoder_hidden_states",)
    made = next(iter(model.iter_trajectories()))[1]["inputs"]["hidden_states"]
    assert torch.allclose(made, exact, atol=1e-5) and not torch.equal(made, tiny_model.inputs(1, 1.0)["hidden_states"])


def test_what_is_too_large_for_memory(canonical: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_too_large(canonical)
    monkeypatch.setattr(blocks.psutil, "virtual_memory", lambda: type("Free", (), {"available": 200_000}))
    assert is_too_large(canonical) and not is_too_large(canonical, share=5.0)
