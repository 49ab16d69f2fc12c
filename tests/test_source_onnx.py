""".onnx files as models: exported by others, named and shaped as they liked; and our own float graph."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import diffusers_folders as folders
from tests import onnx_files as files
from tests.commands import assert_one_line, command
from tests.refusals import Answer, Case, ask
from vdq_export import ort, pipeline, recorded
from vdq_export.bundle import Bundle
from vdq_export.contract import PassContext
from vdq_export.errors import ModelError
from vdq_export.graph import OUTPUT
from vdq_export.model import Model
from vdq_export.sources import resolve
from vdq_export.trace import trace

FORMS: dict[str, dict[str, Any]] = {
    "TorchScript, opset 18": {},
    "free dimensions": {"dynamic_axes": {"x": {0: "batch", 1: "tokens"}, "step": {0: "batch"}, "words": {0: "batch"}}},
    "torch.export, opset 18": {"dynamo": True},
    "torch.export, opset 21": {"dynamo": True, "opset_version": 21},
    "torch.export, opset 23": {"dynamo": True, "opset_version": 23},
}


def model_of(path: Path, **options: object) -> Model:
    files.record(path.parent / "traj")
    text = "".join(f"&{name}={value}" for name, value in options.items())
    return resolve(f"{path}?trajectories={path.parent / 'traj'}{text}")


@pytest.mark.parametrize("form", FORMS)
def test_files_become_graphs_of_ours(form: str, tmp_path: Path) -> None:
    """Equal outputs before and behind the canonical passes; linears have the names of their modules."""
    model = model_of(files.export(tmp_path / "dit.onnx", **FORMS[form]))
    assert model.timestep_input == "step"
    graph = trace(model)
    exact = files.Dit().eval()(**model.example_inputs).detach().numpy()
    feeds = {name: tensor.numpy() for name, tensor in model.example_inputs.items()}
    assert np.abs(ort.run(graph, feeds)[OUTPUT] - exact).max() < 1e-5
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    assert np.abs(ort.run(graph, feeds)[OUTPUT] - exact).max() < 1e-5
    assert {linear.name for linear in graph.linears()} == files.LINEARS
    told = any("free dimensions" in note for note in model.metadata["notes"])
    assert told == (form == "free dimensions")


def test_a_file_becomes_a_bundle(tmp_path: Path) -> None:
    """Through the commands; `verify` finds file and trajectories by the bundle's model name."""
    files.export(tmp_path / "dit.onnx", dynamo=True, opset_version=20)
    files.record(tmp_path / "traj")
    arguments = ("dit.onnx", "--trajectories", "traj", "--timestep-input", "step", "--tsw", "2", "-q", "--out", "b")
    code, out, err = command(*arguments, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "2 bins, 18 layers quantized, 1 in float" in out
    assert Bundle.open(tmp_path / "b").plans[0].layers
    code, out, err = command("verify", "b", cwd=tmp_path)
    assert code == 0, out + err
    proto = onnx.load(tmp_path / "dit.onnx")
    proto.graph.initializer[0].raw_data = bytes(4) + proto.graph.initializer[0].raw_data[4:]
    onnx.save(proto, tmp_path / "dit.onnx")
    code, out, err = command("verify", "b", cwd=tmp_path)
    assert_one_line((code, "", err), "other weights")


def test_our_own_float_graph_comes_back(tmp_path: Path) -> None:
    """What trace() made of a Wan, saved: the same linears under the same names."""
    folders.transformer("Wan", tmp_path / "model")
    wan = resolve(folders.spec(tmp_path / "model", steps=2))
    graph = trace(wan)
    graph.save(tmp_path / "wan.onnx")
    (tmp_path / "traj").mkdir()
    for number, one in enumerate(wan.iter_trajectories()):
        recorded.save(one, tmp_path / "traj" / f"{number}.safetensors")
    again = trace(resolve(f"{tmp_path / 'wan.onnx'}?trajectories={tmp_path / 'traj'}"))
    context = PassContext()
    for one in (graph, again):
        pipeline.run_passes(one, pipeline.canonical("ort-int8"), context)
    assert [linear.name for linear in again.linears()] == [linear.name for linear in graph.linears()]
    for one, other in zip(again.linears(), graph.linears(), strict=True):
        assert np.array_equal(one.read_weight(), other.read_weight())


def external(path: Path) -> Path:
    """The file with its weights beside it."""
    proto = onnx.load(files.export(path, dynamo=True, opset_version=21))
    data = f"{path.name}.data"
    onnx.save_model(proto, path, save_as_external_data=True, location=data, size_threshold=64)
    return path


def test_weights_beside_the_file_are_mapped(tmp_path: Path) -> None:
    model = model_of(external(tmp_path / "dit.onnx"))
    assert model.graph is not None
    large = [one for one in model.graph.constants() if one.values.nbytes >= 4096]
    assert large
    assert all(isinstance(one.values, np.memmap) for one in large)
    exact = files.Dit().eval()(**model.example_inputs).detach()
    assert torch.allclose(model(**model.example_inputs), exact, atol=1e-5)


def test_the_timestep_is_guessed_or_named(tmp_path: Path) -> None:
    path = files.export(tmp_path / "dit.onnx")
    assert model_of(path, timestep_input="step").timestep_input == "step"
    with pytest.raises(ModelError, match=r"step 0: t is 900, the input 'words' holds .* or --timestep-input"):
        model_of(path, timestep_input="words")
    with pytest.raises(ModelError, match="no input 'when'"):
        model_of(path, timestep_input="when")
    files.record(tmp_path / "traj", step=torch.tensor([1.0]))
    with pytest.raises(ModelError, match=r"which input is the timestep.*--timestep-input NAME, one of x, step, words"):
        resolve(f"{path}?trajectories={tmp_path / 'traj'}")


# -- what is refused -------------------------------------------------------------------------------------------------


def case(edit: Callable[[onnx.ModelProto], object] | None = None, **changes: Any) -> Callable[[Path], None]:
    """A file and its trajectories in its folder; edit: of the file; changes: of the recorded inputs."""

    def make(path: Path) -> None:
        files.record(path.parent / "traj", **changes)
        files.export(path)
        if edit is not None:
            proto = onnx.load(path)
            edit(proto)
            onnx.save(proto, path)

    return make


def beside(edit: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        files.record(path.parent / "traj")
        edit(external(path))

    return make


def half(proto: onnx.ModelProto) -> None:
    weight = next(one for one in proto.graph.initializer if len(one.raw_data) > 999)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float16), weight.name))


def another_output(proto: onnx.ModelProto) -> None:
    name = proto.graph.node[3].output[0]
    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))


def quantized(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), "s"))
    proto.graph.node.insert(0, onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["q"], "quantize"))


def relocate(path: Path) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    onnx.save(proto, path)


TRAJ = ["--trajectories", "TRAJ"]
CASES: dict[str, Case] = {
    "no trajectories": (case(), [], ("recorded trajectories", "--trajectories")),
    "no ONNX": (
        lambda path: (files.record(path.parent / "traj"), path.write_bytes(b"x" * 50)), TRAJ, ("no ONNX model",),
    ),
    "no file": (lambda path: files.record(path.parent / "traj"), TRAJ, ("no file", "model.onnx")),
    "sizes": (case(), [*TRAJ, "--frames", "5"], ("--frames", "fixed")),
    "old opset": (case(lambda proto: setattr(proto.opset_import[0], "version", 11)), TRAJ, ("opset 11", "18", "21")),
    "new opset": (case(lambda proto: setattr(proto.opset_import[0], "version", 99)), TRAJ, ("opset 99",)),
    "half precision": (case(half), TRAJ, ("half precision", "float32")),
    "two outputs": (case(another_output), TRAJ, ("2 outputs", "noise")),
    "quantized": (case(quantized), TRAJ, ("quantized already", "QuantizeLinear", "float graph")),
    "input not recorded": (case(words=None), TRAJ, ("no input 'words'", "x, step, words")),
    "input of another shape": (case(words=torch.ones(1, 4, 16)), TRAJ, ("words", "[1, 4, 16]", "5")),
    "input of another type": (case(step=torch.tensor([5])), TRAJ, ("step", "float32", "int64")),
    "weights missing": (
        beside(lambda path: path.with_name("model.onnx.data").unlink()), TRAJ, ("model.onnx.data", "missing"),
    ),
    "weights cut short": (
        beside(lambda path: path.with_name("model.onnx.data").write_bytes(b"x" * 64)), TRAJ, ("cut short", "byte"),
    ),
    "weights elsewhere": (beside(relocate), TRAJ, ("outside the model's folder",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """Each case's answer, run in the folder above its own."""
    placed = {
        name: (make, [f"{number}/traj" if one == "TRAJ" else one for one in options], words)
        for number, (name, (make, options, words)) in enumerate(CASES.items())
    }
    return ask(tmp_path_factory.mktemp("onnx"), placed, "model.onnx")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="cases are forks")
@pytest.mark.parametrize("name", CASES)
def test_one_line_says_what_and_where(name: str, answers: dict[str, Answer]) -> None:
    assert_one_line(answers[name], *CASES[name][2])
