"""Encodings say what the Q/DQ nodes say, in three formats, and with the float graph they are the Q/DQ graph again.

AIMET itself is asked in tests/test_encodings_aimet.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_bundle
from tests.commands import assert_one_line, command
from tests.qdq_graphs import small_qdq
from vdq_export import ort
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.errors import BundleError
from vdq_export.graph import Graph
from vdq_export.handoff import encodings, float_graph
from vdq_export.handoff.encodings import VERSIONS, Encoding, Version
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.schedule import Schedule

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
X: Array = RANDOM.uniform(-1, 1, (4, 64)).astype(np.float32)


def tensors(graph: Graph) -> dict[str, Encoding]:
    return {one.name: one for one in encodings.of_graph(graph)}


def test_every_pair_and_every_constant_has_an_encoding() -> None:
    graph = small_qdq()
    found = tensors(graph)
    assert list(found) == [
        "x",
        "weight",
        "bias",
        "product",
        "shift",
        "shifted",
        "soft",
        "soft.second/DQ",
        "turned",
        "y",
    ]
    assert len(found) == sum(node.op == "DequantizeLinear" for node in graph.nodes)
    assert (found["weight"].dtype, found["weight"].axis, found["weight"].parameter) == ("int8", 1, True)
    assert (found["bias"].dtype, found["bias"].axis) == ("int32", 0)
    assert [found[name].dtype for name in ("soft", "soft.second/DQ")] == ["uint16", "int16"]
    assert found["product"].zero_point == 121 and found["product"].offset == -121
    assert found["weight"].offset.tolist() == [-128] * 8 and found["soft.second/DQ"].offset == -32768


def test_the_same_numbers_in_every_version() -> None:
    found = tensors(small_qdq())
    for version in VERSIONS:
        again = {one.name: one for one in encodings.from_json(encodings.to_json(found.values(), version))}
        assert again.keys() == found.keys()
        for name, one in found.items():
            assert np.array_equal(again[name].scale, one.scale) and again[name].dtype == one.dtype
            assert np.array_equal(again[name].zero_point, one.zero_point)


dtypes = st.sampled_from(["int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"])
scales = st.floats(2.0**-100, 2.0**100, width=32)


@st.composite
def an_encoding(draw: Callable[[st.SearchStrategy[Any]], Any], *, symmetric_or_unsigned: bool = False) -> Encoding:
    dtype = draw(dtypes)
    bits, signed = int(dtype.removeprefix("u")[3:]), not dtype.startswith("u")
    low = -(2 ** (bits - 1)) if signed else 0
    channels = draw(st.sampled_from([None, 1, 3]))
    count = channels or 1
    zero = draw(st.lists(st.integers(low, low + 2**bits - 1), min_size=count, max_size=count))
    if symmetric_or_unsigned and signed:
        zero = [0] * count
    shape = () if channels is None else (channels,)
    scale = np.array(draw(st.lists(scales, min_size=count, max_size=count)), np.float32).reshape(shape)
    axis = None if channels is None else draw(st.integers(0, 3))
    return Encoding(draw(st.text(min_size=1)), dtype, scale, np.array(zero, np.int64).reshape(shape), axis)


@given(an_encoding())
@settings(deadline=None)
def test_version_2_round_trip(one: Encoding) -> None:
    (again,) = encodings.from_json(encodings.to_json([one], "2.0.0"))
    assert again.same_grid(one) and again.name == one.name


@given(an_encoding(symmetric_or_unsigned=True), st.sampled_from(["0.6.1", "1.0.0"]), st.booleans())
@settings(deadline=None)
def test_older_round_trips(one: Encoding, version: Version, parameter: bool) -> None:
    one = Encoding(one.name, one.dtype, one.scale, one.zero_point, one.axis, parameter=parameter)
    (again,) = encodings.from_json(encodings.to_json([one], version))
    assert np.array_equal(again.scale.reshape(-1), one.scale.reshape(-1)) and again.dtype == one.dtype
    assert np.array_equal(again.zero_point.reshape(-1), one.zero_point.reshape(-1))
    assert again.parameter == parameter and again.name == one.name


def test_a_signed_grid_around_another_number_than_zero_is_written_in_unsigned_terms() -> None:
    one = Encoding("v", "int8", np.array(0.5, np.float32), np.array(-3))
    for version in ("0.6.1", "1.0.0"):
        (again,) = encodings.from_json(encodings.to_json([one], version))
        assert (again.dtype, int(again.zero_point)) == ("uint8", 125)
    entry = json.loads(encodings.to_json([one], "0.6.1"))["activation_encodings"]["v"][0]
    assert (entry["min"], entry["max"]) == ((-128 + 3) * 0.5, (127 + 3) * 0.5)


def test_blocks_in_the_order_each_version_wants() -> None:
    found = tensors(small_qdq(block=32))["weight"]
    assert (found.dtype, found.axis, found.block, found.scale.shape) == ("int4", 0, 32, (2, 8))
    entry = json.loads(encodings.to_json([found], "1.0.0"))["param_encodings"][0]
    assert (entry["enc_type"], entry["block_size"], entry["bw"]) == ("PER_BLOCK", 32, 4)
    assert entry["scale"] == found.scale.T.reshape(-1).tolist()  # output channels first
    (again,) = encodings.from_json(encodings.to_json([found], "2.0.0"))
    assert again.same_grid(found)
    with pytest.raises(BundleError, match=r"0\.6\.1 has no block scales"):
        encodings.to_json([found], "0.6.1")


@pytest.mark.parametrize("block", [0, 32])
def test_the_float_graph_is_the_same_model_without_q_and_dq(tmp_path: Path, block: int) -> None:
    """Its constants are on their grid; quantizing its values by the encodings gives the Q/DQ graph's result back."""
    graph = small_qdq(block=block)
    float_graph.save(graph, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    stripped = Graph.load(tmp_path / "model.onnx")
    assert [node.op for node in stripped.nodes] == ["Gemm", "Add", "Softmax", "Identity", "Transpose", "MatMul"]
    found = tensors(graph)
    assert found.keys() <= stripped.values().keys()
    for name in ("weight", "bias", "shift"):
        one, held = found[name], stripped.values()[name].values
        inner = ort.run(graph, {"x": X}, [name])[name]
        assert held.dtype == np.float32 and np.array_equal(held, inner), one
    plain = ort.run(stripped, {"x": X})["y"]
    requantized = _with_encodings(stripped, found)
    assert np.array_equal(ort.run(requantized, {"x": X})["y"], ort.run(graph, {"x": X})["y"])
    assert 0 < np.abs(plain - ort.run(graph, {"x": X})["y"]).max() < 0.05


def _with_encodings(graph: Graph, found: dict[str, Encoding]) -> Graph:
    """Q/DQ behind every activation of the float graph that has an encoding."""
    types = {"uint8": np.uint8, "uint16": np.uint16, "int16": np.int16}
    for name, one in found.items():
        if one.parameter:
            continue
        value = graph.values()[name]
        scale = graph.constant(graph.fresh(f"{name}#s"), one.scale)
        zero = graph.constant(graph.fresh(f"{name}#z"), one.zero_point.astype(types[one.dtype]))
        q = graph.add_node("QuantizeLinear", [value, scale, zero], graph.fresh(f"{name}#q"), dtype=None, shape=None)
        made = graph.fresh(f"{name}#dq")
        dq = graph.add_node("DequantizeLinear", [q, scale, zero], made, dtype=np.float32, shape=value.shape)
        graph.replace_uses(value, dq, keep=[q.inputs[0]])
    graph.cleanup()
    return graph


def test_deterministic_bytes_one_tensor_a_line() -> None:
    found = list(tensors(small_qdq()).values())
    for version in VERSIONS:
        data = encodings.to_json(found, version)
        assert data == encodings.to_json(list(tensors(small_qdq()).values()), version)
        assert json.loads(data)["version"] == version
        assert data.count(b"\n") >= len(found) and data.endswith(b"\n")


def test_what_encodings_cannot_say_is_refused() -> None:
    clipped = small_qdq()
    dequantize = next(node for node in clipped.nodes if node.name == "product/DQ")
    low = clipped.constant("low", np.array(0, np.uint8))
    clip = clipped.add_node("Max", [dequantize.inputs[0], low], "clip", dtype=np.uint8, shape=(4, 8))
    dequantize.inputs[0] = clip
    with pytest.raises(BundleError, match="computes in integers"):
        encodings.of_graph(clipped)
    differing = small_qdq()
    node = next(node for node in differing.nodes if node.name == "product/DQ")
    node.inputs[1] = differing.constant("other", np.array(0.06, np.float32))
    with pytest.raises(BundleError, match="differ in scale"):
        encodings.of_graph(differing)


def test_a_bundle_carries_them_and_the_command_writes_one_float_graph(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        graphs = {f"bin{index:02d}": small_qdq(gain=tiny_bundle.gain(index)) for index in range(4)}
        paths = encodings.write_encodings(writer, graphs)
        assert len(paths) == 4 * len(VERSIONS) and paths[0] == "handoff/encodings/bin00.aimet-0.6.1.json"
        _commit(writer, graphs)
    held = [(tmp_path / "bundle" / path).read_bytes() for path in paths]
    assert len(set(held)) == len(held)
    code, text, error = command("encodings", "bundle", "--out", "out", "--json", cwd=tmp_path)
    assert code == 0, error
    rows = json.loads(text)["graphs"]
    assert {row["model"] for row in rows} == {"model.onnx"} and len(rows) == 4
    assert [row["tensors"] for row in rows] == [10] * 4
    assert (tmp_path / "out" / "bin03.aimet-2.0.0.json").read_bytes() == held[-1]
    assert_one_line(command("encodings", "bundle", "--out", "out", cwd=tmp_path), "exists")


def _commit(writer: BundleWriter, graphs: dict[str, Graph]) -> None:
    """A bundle of these graphs; the signature is the tiny bundle's, as nobody runs it here."""
    paths = [writer.add_graph(f"body.{name}", *graph.skeleton()) for name, graph in graphs.items()]
    signature = signature_of(graphs["bin00"].skeleton()[0], "x")
    manifest = Manifest(
        model=ModelIdentity(name="small", weight_hash="0"), target="test", isa="any", signature=signature
    )
    writer.commit(manifest, Schedule.from_bins(tiny_bundle.bins(), paths, sampler={}))


def test_a_bundle_without_q_and_dq_has_none(tmp_path: Path) -> None:
    tiny_bundle.write(tmp_path / "bundle")
    assert_one_line(command("encodings", "bundle", "--out", "out", cwd=tmp_path), "no Q/DQ graph")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
