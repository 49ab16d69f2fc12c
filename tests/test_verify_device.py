"""verify --device on bundles whose graphs are small QDQ blocks, and on graphs alone; the emulator is the real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.commands import assert_one_line, command
from tests.quantized_blocks import Builder, block, linear
from vdq_export import cli, ort
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.devices.verify import Choices, calls_by_bin, random_feeds, verify_device
from vdq_export.errors import CompileError, ModelError
from vdq_export.graph import Array, Graph
from vdq_export.graphs.cut import encodings, unquantized
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.model import Model, Step
from vdq_export.plan import Bin, QuantPlan
from vdq_export.recipe import Recipe
from vdq_export.schedule import Schedule
from vdq_export.targets.qnn import dump, hexagon

on_hexagon = pytest.mark.skipif(not hexagon.available(), reason="needs onnxruntime-qnn")
HALVES = ((500.0, 1000.0), (0.0, 500.0))  # t of bin 0 and bin 1


class Module(torch.nn.Module):
    """What the blocks' graphs compute, unrounded, plus t · 0."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(1))
        self._graph = unquantized(graph)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        (found,) = ort.run(self._graph, {"x": x.numpy(), "timestep": timestep.numpy()}, exact=True).values()
        return torch.from_numpy(found)


def timed(fault: str = "") -> tuple[Graph, dict[str, Array]]:
    """An FFN and the timestep over [4, 16, 32]; with a fault: the same, weight scales along the input channel."""
    make = Builder()
    x = make.input("x", 4, 16, 32)
    make.arrays["timestep"] = make.feeds["timestep"] = np.full((1, 1, 1), 1000, np.float32)
    t = make.settle("timestep")
    t = make.op("Mul", t, make.constant("small", 1e-6), name="time/Mul")
    axis = 0 if fault else 1
    x = linear(make, make.op("Gelu", linear(make, x, "up", 64, axis, varied=0), name="Gelu"), "down", 32)
    return make.graph(make.op("Add", x, t, name="last/Add")), make.feeds


def model_of(graph: Graph, feeds: dict[str, Array]) -> Model:
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def trajectory() -> list[list[Step]]:
        return [
            [
                {"t": t, "branch": "cond", "inputs": {**inputs, "timestep": torch.full((1, 1, 1), t)}}
                for t in (900.0, 600.0, 500.0, 400.0, 100.0)
            ]
        ]

    return Model(Module(graph), inputs, trajectory, name="tests.test_verify_device:build")


def build() -> Model:
    return model_of(*timed())


def bundle_of(out: Path, *graphs: Graph) -> Bundle:
    """A bundle of as many bins as graphs (two), for build()'s model."""
    model = build()
    bins = tuple(Bin(index=i, t=ends, steps=(sum(ends) / 2,)) for i, ends in enumerate(HALVES))
    plan = QuantPlan(
        model=model.name, graph_hash="0", target="qnn", recipe=Recipe(name="r", summary="s"), bins=bins, layers=(),
        bins_why="two",
    )  # fmt: skip
    with BundleWriter(out) as writer:
        paths = []
        for one, graph in zip(bins, graphs, strict=True):
            paths.append(writer.add_graph(f"body.{one.name}", *graph.skeleton()))
        writer.add_file("plan.json", plan.to_json())
        identity = ModelIdentity(name=model.name, weight_hash=model.weight_hash())
        signature = signature_of(graphs[0].skeleton()[0], "timestep")
        manifest = Manifest(model=identity, target="qnn", isa="v75", signature=signature)
        return writer.commit(manifest, Schedule.from_bins(list(bins), paths, sampler={"name": "euler", "steps": 4}))


@pytest.fixture(scope="module")
def healthy() -> Graph:
    return timed()[0]


@pytest.fixture(scope="module")
def one_bad(tmp_path_factory: pytest.TempPathFactory, healthy: Graph) -> Path:
    """A bundle whose bin 1 has weight scales along the input channel: it compiles and is wrong."""
    return bundle_of(tmp_path_factory.mktemp("bundles") / "bad", healthy, timed("weight")[0]).path


@on_hexagon
def test_a_healthy_bundle_passes(tmp_path: Path, healthy: Graph) -> None:
    bundle = bundle_of(tmp_path / "good", healthy, healthy)
    report = verify_device(bundle, build(), Choices(arch="v79", steps=3, bisect=True))
    assert (report.verdict, report.failures, report.psnr_db) == ("pass", (), None)
    device = report.device
    assert device is not None and (device.arch, device.clips, device.bisection) == ("v79", 0, None)
    assert [(one.bin, one.steps, one.off_device) for one in device.bins] == [(0, 3, ()), (1, 2, ())]
    for one in device.bins:
        assert one.exact_db is not None and one.device_db is not None and one.agreement_db is not None
        assert one.exact_db > 60 and one.agreement_db > 60, "16-bit activations of an otherwise equal graph"
        assert one.drop_db == one.exact_db - one.device_db
    assert {(quality.layer, quality.bin) for quality in report.layers} == {("sample", 0), ("sample", 1)}


@on_hexagon
def test_the_command_fails_and_names_the_operator(one_bad: Path, tmp_path: Path) -> None:
    given = (
        "verify",
        one_bad,
        "--device",
        "htp-emulator",
        "--steps-per-bin",
        "1",
        "--bisect",
        "--out",
        tmp_path / "out",
    )
    code, out, err = command(*given, "--json", "--save", cwd=tmp_path)
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["verdict"] == "fail"
    assert {"verdict", "psnr_db", "judge", "integer_kernels", "bundle_bytes", "layers", "failures"} <= report.keys()
    good, bad = report["device"]["bins"]
    assert good["agreement_db"] > 60 and bad["drop_db"] > 10
    assert [line.split(":")[0] for line in report["failures"]] == ["bin01"], "the other bin is right"
    suspect = report["device"]["bisection"]["suspect"]
    assert (suspect["node"], suspect["op"], suspect["what"]) == ("up/MatMul", "MatMul", "numbers")
    assert [one["channels"] for one in suspect["inputs"]] == [0, 32]
    assert report["device"]["bisection"]["graph"] == "graphs/body.bin01.onnx"
    assert (tmp_path / "out" / suspect["reproduction"]).is_file()
    saved = Bundle.open(one_bad)
    assert saved.manifest.file("report/device.json") is not None
    assert json.loads((one_bad / "report/device.json").read_bytes()) == report


@on_hexagon
def test_a_graph_alone_is_searched(tmp_path: Path) -> None:
    timed("weight")[0].save(tmp_path / "block.onnx")
    code, out, err = command("verify", "block.onnx", "--device", "htp-emulator", "--bisect", cwd=tmp_path)
    assert (code, err) == (1, "")
    assert out.startswith("searched block.onnx: 7 operators, ")
    assert "first operator that disagrees: MatMul up/MatMul (numbers)\n" in out
    assert "uint16, scale " in out and "dB against the exact result on exact inputs" in out


@on_hexagon
def test_a_bin_that_does_not_compile(tmp_path: Path, healthy: Graph) -> None:
    broken = healthy.copy()
    gelu = next(node for node in broken.nodes if node.op == "Gelu")
    gelu.op = "Cosh"  # no kernel on the HTP, nor in the exact form of this graph
    bundle = bundle_of(tmp_path / "bundle", healthy, broken)
    report = verify_device(bundle, build(), Choices(steps=1, clips=1))
    assert report.verdict == "fail" and report.device is not None
    one = report.device.bins[1]
    assert one.off_device or one.error
    assert any("Gelu" in line or "Cosh" in line for line in report.failures)


def test_another_model_is_refused(one_bad: Path) -> None:
    other = build()
    torch.nn.init.ones_(other.module.shift)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="other weights"):
        verify_device(Bundle.open(one_bad), other)


def test_calls_are_spread_over_a_bins_steps(one_bad: Path) -> None:
    bundle = Bundle.open(one_bad)
    found = calls_by_bin(bundle, build(), 2)
    assert {index: [one["t"] for one in calls] for index, calls in found.items()} == {
        0: [900.0, 500.0],
        1: [400.0, 100.0],
    }
    assert [len(calls) for calls in calls_by_bin(bundle, build(), 9).values()] == [3, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bisect",), ("--device",)),
        (("--device", "gpu"), ("htp-emulator",)),
        (("--device", "htp-emulator", "--arch", "v99"), ("v99", "v79")),
    ],
)
def test_refusals(
    one_bad: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(sys, "argv", ["vdq-export", "verify", str(one_bad), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert_one_line((int(str(stopped.value.code)), *capsys.readouterr()), *words)


# -- the backend's dump ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, Path]:
    graph, folder = block()[0], tmp_path_factory.mktemp("dump")
    graph.save(folder / "block.onnx")
    hexagon.emulator(folder / "block.onnx", dump_json=folder / "dump")
    return graph, folder / "dump"


@on_hexagon
def test_the_backends_scales_are_the_graphs(dumped: tuple[Graph, Path]) -> None:
    graph, folder = dumped
    found = dump.compare(graph, dump.read(folder))
    assert found.quantizers == len(list(encodings(graph)))
    assert found.found == found.quantizers - 1, "the transposition is the MatMul's own there"
    assert found.per_channel == 7, "the weights"
    assert (found.largest_difference, found.mismatches, found.foreign, found.float_tensors) == (0.0, (), (), ())


def _scale(graph: Graph) -> str:
    node = next(node for node in graph.nodes if node.name == "attn/Mul/Q")
    node.inputs[1].values = np.nextafter(node.inputs[1].values, np.float32(1))
    return "attn/Mul/Q"


def _zero_point(graph: Graph) -> str:
    node = next(node for node in graph.nodes if node.name == "attn/Mul/Q")
    node.inputs[2].values = node.inputs[2].values + np.uint16(1)
    return "attn/Mul/Q"


def _channels(graph: Graph) -> str:
    node = next(node for node in graph.nodes if node.name == "ffn.up.weight")
    node.inputs[1].values = node.inputs[1].values[:-1]
    return str(node.inputs[0].name)


@on_hexagon
@pytest.mark.parametrize("change", [_scale, _zero_point, _channels])
def test_one_changed_quantizer_is_named(dumped: tuple[Graph, Path], change: Callable[[Graph], str]) -> None:
    graph = dumped[0].copy()
    graph = Graph.from_proto(graph.to_proto())
    name = change(graph)
    assert dump.compare(graph, dump.read(dumped[1])).mismatches == (name,)


@on_hexagon
def test_a_quantizer_of_the_backends_own_and_float_inside_are_named(dumped: tuple[Graph, Path]) -> None:
    own = dump.Tensor("QuantizeLinear_token_1_out0", "uint16", True, np.float32(0.125), 7)
    floating = dump.Tensor("norm/Pow", "float32", True)
    outside = dump.Tensor("x", "float32", False)
    found = dump.compare(dumped[0], [own, floating, outside])
    assert (found.found, found.foreign, found.float_tensors) == (0, (own.name,), (floating.name,))


@on_hexagon
def test_four_bit_weights_are_recognized(tmp_path: Path) -> None:
    make = Builder()
    x = make.input("x", 1, 16, 32)
    graph = make.graph(make.op("MatMul", x, make.weight("w", 32, 64), name="MatMul"))
    weight = next(node for node in graph.nodes if node.name == "w").inputs
    for one in (weight[0], weight[2]):
        one.values = np.clip(one.values // 16, -7, 7).astype(ml_dtypes.int4)
    graph.save(tmp_path / "four.onnx")
    hexagon.emulator(tmp_path / "four.onnx", dump_json=tmp_path / "dump")
    found = dump.compare(graph, dump.read(tmp_path / "dump"))
    assert (found.quantizers, found.found, found.per_channel, found.mismatches) == (3, 3, 1, ())


def test_no_dump_or_a_foreign_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no description"):
        dump.read(tmp_path)
    (tmp_path / "x.json").write_text('{"graph": 1}', encoding="utf-8")
    with pytest.raises(CompileError, match=r"x\.json: not the backend's dump"):
        dump.read(tmp_path)


def test_random_feeds_fill_the_ranges_of_the_inputs() -> None:
    graph, feeds = block()
    made = random_feeds(graph)
    assert made.keys() == feeds.keys()
    assert (made["x"].dtype, made["x"].shape) == (np.dtype("float32"), (4, 16, 32))
    assert 0.5 < made["x"].std() / feeds["x"].std() < 2
    graph.gs.inputs[0].shape = []
    assert random_feeds(graph)["x"].shape == ()
    graph.gs.inputs[0].shape = ["batch", 16, 32]
    with pytest.raises(ModelError, match="'x' has the shape"):
        random_feeds(graph)
