"""The parts of the CUDA benchmark that need no GPU: kept graphs, floors, tables, preparing, refusals."""

from __future__ import annotations

import lzma
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from benchmarks import common
from benchmarks.cuda import __main__ as benchmark
from benchmarks.cuda import floors, graphs, linears, prepare, steps
from tests.cuda_blocks import INT4, INT8, Block
from vdq_export.graph import Graph
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.ops import INPUTS

BLOCKS = {"small.w8a8": Block(INT8, attention="q k v"), "small.w4a8": Block(INT4)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fused blocks as the kept graphs are: compressed, weights named and not there."""
    folder = tmp_path_factory.mktemp("graphs")
    for name, block in BLOCKS.items():
        merged, _ = block.merged()
        fuse.run(merged)
        (folder / f"{name}.onnx.xz").write_bytes(lzma.compress(_without_weights(merged)))
    return folder


def _without_weights(graph: Graph) -> bytes:
    proto = graph.to_proto()
    offset = 0
    for tensor in proto.graph.initializer:
        size = len(tensor.raw_data)
        if size < 512 or tensor.name == "bins":
            continue
        entries = {"location": "weights/weights.bin", "offset": str(offset), "length": str(size)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        offset += -(-size // 64) * 64
    assert offset
    return proto.SerializeToString()


def test_a_kept_graph_gets_random_weights_and_runs(kept: Path, tmp_path: Path) -> None:
    program = lower(graphs.materialize("small.w8a8", tmp_path, kept), dtype=torch.float16)
    weights = [one for one in vars(program.module).values() if hasattr(one, "kind")]
    assert weights and all(len(np.unique(one.data.numpy())) > 100 and bool((one.scale > 0).all()) for one in weights)
    (found,) = program(steps.inputs_of(program)).values()
    assert bool(found.isfinite().all()) and float(found.std()) > 0


def test_floors_are_those_of_the_shapes(kept: Path) -> None:
    """Without values a file is as long, and counting needs none."""
    counted = {name: floors.calls_of(floors.without_values(name, kept)) for name in BLOCKS}
    eight, four = ({(one.kernel, one.shape): one for one in counted[name]} for name in BLOCKS)
    assert {kernel for kernel, _ in eight} >= {"linear_int8", "normalize", "rope", "attention_int8, v in FP8"}
    assert {kernel for kernel, _ in four} >= {"linear_int4", "attention, torch"}
    for (kernel, shape), one in [*eight.items(), *four.items()]:
        assert 0 < one.floor <= one.expected
        if kernel.startswith("linear"):
            m, k, n = (int(size) for size in shape.split(" × "))
            assert one.operations == 2 * m * k * n * one.count
            least = m * k + k * n * (0.5 if kernel == "linear_int4" else 1.0) + m * n
            assert least <= one.bytes / one.count <= least + 12 * m * n + 32 * n + 4 * k * n / 32
    _, heads, rows = floors.step_table("small", counted["small.w8a8"])
    assert all(len(row) == len(heads) for row in rows)
    assert int(rows[-1][2]) == sum(one.count for one in counted["small.w8a8"])


def test_the_count_of_a_large_linear_is_the_issue_s() -> None:
    _, heads, rows = floors.linear_table()
    assert [row[0] for row in rows] == [f"{k} × {n}" for k, n in linears.SHAPES]
    floor = {row[0]: float(row[heads.index("floor ms")]) for row in rows}
    # 2 · 32760 · 5120² / 1979e12 = 0.868 ms, and 3 bytes of each of 32760 · 5120 numbers at 4.8 TB/s = 0.105 ms
    assert floor["5120 × 5120"] == pytest.approx(0.973, abs=0.006)


def test_weights_are_counted_with_their_scales_and_sums(kept: Path) -> None:
    _, heads, (row,) = floors.memory_table([("small.w8a8", floors.without_values("small.w8a8", kept))])
    told = dict(zip(heads, row, strict=True))
    shapes = [tuple(one.dims) for one in graphs.load("small.w8a8", kept).graph.initializer
              if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 2]  # fmt: skip
    numbers, columns = sum(k * n for k, n in shapes), sum(n for _, n in shapes)
    assert len(shapes) == 6
    assert float(told["× smaller, quantized layers"]) == pytest.approx(2 * numbers / (numbers + 8 * columns), abs=1e-3)
    assert float(told["10⁶ parameters"]) == pytest.approx(numbers / 1e6, abs=0.06)


def test_the_notes_keep_what_stands_around_their_tables(tmp_path: Path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# Before\n<!-- floors -->\nold\n<!-- end of floors -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        floors.write_notes([("One", ("a", "b"), [["1", "2"]])], notes)
    assert notes.read_text(encoding="utf-8") == (
        "# Before\n<!-- floors -->\n### One\n\n| a | b |\n| --- | --: |\n| 1 | 2 |\n<!-- end of floors -->\nafter\n"
    )
    notes.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="no marks"):
        floors.write_notes([], notes)


@pytest.mark.parametrize("name", graphs.names())
def test_kept_graphs_are_fused_and_have_a_float_network(name: str) -> None:
    network, _, kind = name.rpartition(".")
    assert network in steps.NETWORKS and network in prepare.NETWORKS and kind in prepare.RECIPES
    proto = graphs.load(name)
    ops = [node.op_type for node in proto.graph.node]
    assert not {"QuantizeLinear", "DequantizeLinear", "MultiHeadAttention", "RotaryEmbedding", "Softmax"} & set(ops)
    assert ops.count("MatMul") <= 1  # the last projection
    attentions = [node for node in proto.graph.node if node.op_type == "Attention"]
    assert attentions
    for node in attentions:
        given = {one for one, value in zip(INPUTS["Attention"], node.input, strict=False) if value}
        assert given >= {"q", "k", "v"} and (given >= {"q_scale", "k_scale", "v_scale"}) == (kind != "w8a8")
    linear = [one for node in proto.graph.node if node.op_type == "Linear" for one in node.attribute]
    assert {one.s for one in linear if one.name == "weight_type"} == {b"int4" if kind.startswith("w4") else b"int8"}


@pytest.mark.parametrize("network", steps.NETWORKS)
def test_the_float_network_takes_its_inputs(network: str) -> None:
    """The class, its settings and inputs are those of the export."""
    import diffusers

    about = steps.NETWORKS[network]
    settings = {"wan-1.3b": prepare.WAN, "hunyuan-blocks": prepare.HUNYUAN}[network]
    assert about["settings"] == settings
    with torch.device("meta"):
        made = getattr(diffusers, about["class"])(**settings)
    heads, _, channels = about["attention"]
    assert made.config.num_attention_heads == heads and made.config.attention_head_dim == channels
    expected = {port.name: tuple(d.dim_value for d in port.type.tensor_type.shape.dim)
                for port in graphs.load(f"{network}.w8a8").graph.input}  # fmt: skip
    assert expected["hidden_states"] == about["inputs"]["hidden_states"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--only", "linears", "--network", "wan-1.3b"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2 and "no GPU that torch can use" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--only", "nothing"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "invalid choice" in capsys.readouterr().err


def test_what_fails_is_told_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[list[common.Table], Mapping[str, object]]] = []

    def broken(_: object) -> list[common.Table]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "facts", lambda: {"name": "none"})
    monkeypatch.setattr(benchmark, "RUNS", {"checks": lambda _: [("Right", ("a",), [("1",)])], "linears": broken})
    monkeypatch.setattr(common, "write", lambda *given, **_: written.append((given[2], given[3])))
    monkeypatch.setattr(sys, "argv", ["benchmarks.cuda", "--only", "checks", "--only", "linears"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    ((tables, data),) = written
    assert ended.value.code == 1 and data["failed"] == ["linears"]
    assert [title for title, *_ in tables] == ["Right", "linears: failed"]
