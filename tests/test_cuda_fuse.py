"""The fusing rewrites on a whole block: what kernels it becomes, and that they compute what onnxruntime does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from tests import cuda_reference
from tests.cuda_blocks import FP8, INT4, INT8, Block
from vdq_export import ort
from vdq_export.contract import PassReport
from vdq_export.graph import Array, Graph, Node
from vdq_export.metrics import sqnr_db
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda._fused import held, operand, put, result
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.ops import DOMAIN

GROUP32, GROUP64 = replace(INT4, group=32), replace(INT4, group=64)
FLOAT = ("float", 16)
BLOCKS = {  # by the recipe that they are of
    "static-asq": Block(INT8),
    "wan22-w4a4": Block(GROUP32, ("uint8", 4), smooth=True, rank=4),
    "svdquant": Block(GROUP64, ("uint8", 4), smooth=True, rank=8, seed=2),
    "quarot": Block(INT4, ("uint8", 4), rotate=True),
    "quarot, smooth, low rank": Block(INT4, ("uint8", 6), rotate=True, smooth=True, rank=4),
    "w4a16-g64": Block(GROUP64, FLOAT),
    "w8a16": Block(INT8, FLOAT, smooth=True),
    "static-fp8": Block(FP8, ("float8e4m3fn", 8)),
    "int8 attention": Block(INT8, attention="q k"),
    "int8 attention, fp8 values": Block(INT8, attention="q k v"),
    "a layer in float": Block(INT8, kept=("attn.to_k",)),
    "precisions of a schedule": Block(INT8, ("uint8", 4), delta=0.1),
}
# float32 has 24 bits, 144 dB; a few dozen roundings in a row leave 128 (measured: 129 and more). The least of the
# faults below, one Gelu for the other, leaves 83.
EXACT, SEEN = 120.0, 90.0


def fused(block: Block) -> tuple[Graph, list[Graph], dict[str, PassReport]]:
    merged, graphs = block.merged()
    return merged, graphs, {report.name: report for report in fuse.run(merged)}


def outputs(graph: Graph, feeds: Mapping[str, Array], bin: int = 0) -> dict[str, Array]:
    given = dict(feeds) | ({"bin": np.array([bin])} if any(one.name == "bin" for one in graph.gs.inputs) else {})
    return cuda_reference.run(graph.to_proto(), given)


def agreement(graph: Graph, graphs: list[Graph], feeds: Mapping[str, Array]) -> float:
    """The least SQNR of any output in any bin against onnxruntime on the bin's own graph."""
    found = []
    for number, one in enumerate(graphs):
        expected, got = ort.run(one, feeds, exact=True), outputs(graph, feeds, number)
        assert expected.keys() == got.keys()
        found += [sqnr_db(expected[name], got[name]) for name in expected]
    return min(found)


def kinds(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def only(graph: Graph, op: str, name: str = "") -> Node:
    (node,) = [n for n in graph.nodes if n.op == op and n.name.startswith(name)]
    return node


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Graph, list[Graph], dict[str, PassReport]]]:
    return {name: fused(block) for name, block in BLOCKS.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_fused_block_computes_what_the_block_does(made: Any, name: str) -> None:
    graph, graphs, _ = made[name]
    assert agreement(graph, graphs, BLOCKS[name].feeds) > EXACT


@pytest.mark.parametrize("name", BLOCKS)
def test_a_lowered_block_computes_it_too(made: Any, name: str) -> None:
    """By the kernels' plain torch, in float32."""
    graph, graphs, _ = made[name]
    program = lower(graph.to_proto(), device="cpu", dtype=torch.float32)
    for number, one in enumerate(graphs):
        given = BLOCKS[name].feeds | {"bin": np.array([number])}
        fed = {key: torch.from_numpy(given[key]) for key in (v.name for v in graph.gs.inputs)}
        expected, got = ort.run(one, BLOCKS[name].feeds, exact=True), program(fed)
        assert min(sqnr_db(expected[key], got[key].numpy()) for key in expected) > EXACT


@pytest.mark.parametrize("name", BLOCKS)
def test_bins_differ(made: Any, name: str) -> None:
    """Else the test above would not see a wrong row."""
    graph, graphs, _ = made[name]
    if BLOCKS[name].activation != FLOAT:
        one, other = (outputs(graph, BLOCKS[name].feeds, bin) for bin in (0, 1))
        assert all(sqnr_db(one[key], other[key]) < 60 for key in one)
        assert agreement(graph, graphs[::-1], BLOCKS[name].feeds) < 60


_FREE = {"Split", "Pick", "Row", "Reshape", "Slice"}  # views, and the numbers of the bin
_COMMON = {"Linear": 6, "Normalize": 2, "Rope": 2, "Attention": 1, "Add": 2}  # Add: 1 + modulation
KERNELS: Mapping[str, Mapping[str, int]] = {
    "static-asq": {},
    # Mul: smoothing on the rows of modulations. Gemm: of what the FFN's first linear puts out, beside its codes.
    # Normalize: what leaves the attention is smoothed and multiplied with the first factor of the low rank there.
    "wan22-w4a4": {"Mul": 2, "Gemm": 1, "Normalize": 3},
    "svdquant": {"Mul": 2, "Gemm": 1, "Normalize": 3},
    "quarot": {"Normalize": 4},  # in front of to_out and of the FFN's second linear, too
    "quarot, smooth, low rank": {"Mul": 2, "Normalize": 4},
    "w4a16-g64": {},
    "w8a16": {"Mul": 3},  # one on the tokens that leave the attention, in front of floats
    "static-fp8": {},
    "int8 attention": {},
    "int8 attention, fp8 values": {"Rope": 3},
    "a layer in float": {"Linear": 5, "MatMul": 1, "Add": 3},
    "precisions of a schedule": {},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_else_is_left(made: Any, name: str) -> None:
    graph, _, reports = made[name]
    left = {op: count for op, count in kinds(graph).items() if op not in _FREE}
    assert left == {**_COMMON, **KERNELS[name]}
    assert [report.name for report in reports.values()] == [rewrite.NAME for rewrite in fuse.REWRITES]


@pytest.mark.parametrize("name", BLOCKS)
def test_twice_is_once_and_the_same_bytes(made: Any, name: str) -> None:
    graph, _, _ = made[name]
    before = graph.hash()
    assert all(report.applied == 0 for report in fuse.run(graph))
    assert graph.hash() == before
    again, _, _ = fused(BLOCKS[name])
    assert again.hash() == before


def test_codes_are_quantized_once_for_all_that_read_them(made: Any) -> None:
    graph, _, _ = made["static-asq"]
    codes = held(only(graph, "Normalize", "norm1"), "q")
    assert codes.dtype == np.int8
    assert [node.name for node in codes.outputs] == [f"attn.to_{letter}/Linear" for letter in "qkv"]
    assert result(codes.inputs[0], "y") is None


def test_what_others_read_stays_beside_the_codes(made: Any) -> None:
    graph, _, _ = made["a layer in float"]
    norm = only(graph, "Normalize", "norm1")
    assert result(norm, "y") is not None
    assert result(norm, "q") is not None
    assert [node.op for node in held(norm, "y").outputs] == ["MatMul"]


def test_levels_of_narrow_codes(made: Any) -> None:
    def levels(name: str) -> set[tuple[int, int]]:
        nodes = [node for node in made[name][0].nodes if result_of_codes(node)]
        return {(node.attrs["low_level"], node.attrs["high_level"]) for node in nodes}

    assert levels("static-asq") == {(-128, 127)}
    assert levels("quarot") == {(-128, -113)}
    assert levels("quarot, smooth, low rank") == {(-128, -65)}
    assert levels("static-fp8") == {(-448, 448)}


def result_of_codes(node: Node) -> bool:
    return node.domain == DOMAIN and node.op in ("Linear", "Normalize", "Attention") and result(node, "q") is not None


def test_every_step_has_its_place(made: Any) -> None:
    graph, _, _ = made["quarot, smooth, low rank"]
    norm = only(graph, "Normalize", "norm1")
    assert norm.attrs["hadamard"] == 64
    assert {name for name in ("scale", "shift", "smooth", "down", "out_scale") if operand(norm, name) is not None} >= {
        "scale", "shift", "down", "out_scale",
    }  # fmt: skip
    down = only(graph, "Linear", "ffn.down")
    assert {
        name for name in ("low", "up", "gate", "residual", "bias", "x_scale") if operand(down, name) is None
    } == set()
    assert only(graph, "Linear", "ffn.up").attrs["act"] == "gelu_tanh"
    rope = only(made["int8 attention"][0], "Rope", "norm_q")
    assert (rope.attrs["norm"], rope.attrs["heads"], rope.attrs["out_type"]) == ("rms", 2, "int8")


def scaled(name: str, factor: float) -> Callable[[Node], None]:
    def change(node: Node) -> None:
        value = held(node, name)
        value.values = np.asarray(value.values, np.float32) * np.float32(factor)

    return change


def without(*names: str) -> Callable[[Node], None]:
    return lambda node: put(node, **dict.fromkeys(names))


def attribute(name: str, value: Any) -> Callable[[Node], None]:
    return lambda node: node.attrs.__setitem__(name, value)


FAULTS: Mapping[str, tuple[str, str, str, Callable[[Node], None]]] = {
    "no bias": ("static-asq", "Linear", "attn.to_q", without("bias")),
    "no zero point": ("static-asq", "Linear", "attn.to_v", without("x_zero")),
    "no gate": ("static-asq", "Linear", "ffn.down", without("gate")),
    "no residual": ("static-asq", "Linear", "attn.to_out", without("residual")),
    "no activation": ("static-asq", "Linear", "ffn.up", attribute("act", "none")),
    "the other Gelu": ("w4a16-g64", "Linear", "ffn.up", attribute("act", "gelu_erf")),
    "no low rank": ("svdquant", "Linear", "ffn.up", without("low", "up")),
    "no smoothing": ("svdquant", "Linear", "ffn.up", without("post")),
    "other groups": ("svdquant", "Linear", "attn.to_q", scaled("weight_scale", 1.01)),
    "no modulation": ("static-asq", "Normalize", "norm1", without("scale")),
    "no shift": ("static-asq", "Normalize", "norm2", without("shift")),
    "no weight of a norm": ("static-asq", "Normalize", "norm2", without("weight")),
    "no rotation": ("quarot", "Normalize", "norm1", attribute("hadamard", 0)),
    "a smaller rotation": ("quarot", "Normalize", "ffn", attribute("hadamard", 64)),
    "too many levels": ("quarot", "Normalize", "norm1", attribute("high_level", 127)),
    "no embedding": ("static-asq", "Rope", "norm_q", without("cos", "sin")),
    "interleaved": ("static-asq", "Rope", "norm_k", attribute("interleaved", 1)),
    "no norm": ("int8 attention", "Rope", "norm_k", attribute("norm", "none")),
    "other heads": ("static-asq", "Attention", "attn", attribute("heads", 4)),
    "another scale": ("int8 attention", "Attention", "attn", attribute("scale", 0.11)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_step_is_seen(made: Any, fault: str) -> None:
    name, op, path, change = FAULTS[fault]
    graph = made[name][0].copy()
    change(only(graph, op, path))
    assert agreement(graph, made[name][1], BLOCKS[name].feeds) < SEEN
