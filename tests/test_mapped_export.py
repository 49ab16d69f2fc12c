"""A model whose weights stay in their files becomes, byte for byte, the bundle of the model that was loaded.

And no weight of it is ever kept: not by the graph, not by the passes, not by the writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import diffusers_folders as folders
from vdq_export import pipeline
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.sources import resolve
from vdq_export.trace import trace
from vdq_export.weights.promise import Arrays, Promise, ahead, read
from vdq_export.weights.store import WeightStore


def loaded(model: Model) -> Model:
    """The same model with its weights in memory."""
    return replace(model, module=model.materialized(), checkpoint=None, make=None)


def contents(bundle: Bundle) -> dict[str, bytes]:
    """Every file but the manifest, less what names weights by the bytes they were read from: the graph's hash in plans,
    the manifest's too where the report tells it.
    """
    graph, weights = bundle.plans[0].graph_hash.encode(), bundle.manifest.model.weight_hash.encode()
    return {
        path.relative_to(bundle.path).as_posix(): path.read_bytes()
        .replace(graph, b"graph")
        .replace(weights, b"weights")
        for path in sorted(bundle.path.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [("static-asq", torch.bfloat16), ("svdquant", torch.bfloat16), ("w8a16", torch.bfloat16), ("w8a16", torch.float32)],
)
def test_the_same_bundle(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folders.network("Wan").to(dtype).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    model = resolve(folders.spec(tmp_path / "model", steps=2))
    mapped = export(model, recipe=recipe, tsw=1 if recipe == "w8a16" else 2, out=tmp_path / "mapped")
    eager = export(loaded(model), recipe=recipe, tsw=1 if recipe == "w8a16" else 2, out=tmp_path / "eager")
    assert contents(mapped) == contents(eager)
    assert mapped.manifest.model.weight_hash != eager.manifest.model.weight_hash


@pytest.fixture
def canonical(tmp_path: Path) -> Iterator[Graph]:
    folders.network("Wan").to(torch.bfloat16).save_pretrained(tmp_path)
    graph = trace(resolve(folders.spec(tmp_path)))
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    yield graph


def held(graph: Graph) -> int:
    """Bytes of linears' weights that the graph keeps."""
    return sum(x.weight._values.nbytes for x in graph.linears() if not isinstance(x.weight._values, Promise))


def test_nothing_between_trace_and_bundle_keeps_a_weight(canonical: Graph, tmp_path: Path) -> None:
    assert held(canonical) == 0
    assert canonical.hash() == canonical.copy().hash()
    proto, arrays = canonical.skeleton()
    assert held(canonical) == 0
    with WeightStore(tmp_path / "w.bin", "w.bin") as store:
        store.externalise(proto, arrays)
    assert held(canonical) == 0
    weight = canonical.linears()[0].read_weight()
    assert isinstance(weight, np.memmap), "of the store's file, once it was written"
    assert Path(weight.filename).name == "w.bin"


def test_a_promise_is_computed_once_however_many_graphs_hold_it(tmp_path: Path) -> None:
    counted: list[int] = []

    def change(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        counted.append(1)
        return values * 2

    promise = Promise(np.arange(4096, dtype=np.float32), change)
    with WeightStore(tmp_path / "w.bin", "w.bin") as store:
        for _ in range(3):
            tensor = onnx.TensorProto(name="w", dims=[4096], data_type=onnx.TensorProto.FLOAT)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            model = onnx.ModelProto()
            model.graph.initializer.append(tensor)
            store.externalise(model, Arrays({"w": promise}))
    assert counted == [1]
    np.testing.assert_array_equal(read(promise), np.arange(4096) * 2)
    assert promise.is_settled
    assert (tmp_path / "w.bin").stat().st_size == 4 * 4096


@pytest.mark.parametrize("kind", ["INT4", "UINT4"])
def test_four_bit_promises_come_back_from_the_file(kind: str, tmp_path: Path) -> None:
    data_type = getattr(onnx.TensorProto, kind)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type)
    codes = np.resize(np.arange(-7, 8) if kind == "INT4" else np.arange(16), (61, 67)).astype(dtype)
    promise = Promise(codes, lambda values: values)
    with WeightStore(tmp_path / "w.bin", "w.bin") as store:
        store.put(promise, data_type)
    assert read(promise) is not codes
    np.testing.assert_array_equal(read(promise).astype(np.int8), codes.astype(np.int8))
    assert read(promise).dtype == dtype


def test_ahead_keeps_order_and_raises_in_turn() -> None:
    def fail(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        raise ValueError("planted")

    many = [Promise(np.full(1, i), lambda values: values + 1) for i in range(20)]
    assert [int(x[0]) for x in ahead(many, threads=3)] == list(range(1, 21))
    found = []
    with pytest.raises(ValueError, match="planted"):
        for one in ahead([*many[:5], Promise(np.zeros(1), fail), *many], threads=2):
            found.append(int(one[0]))
    assert found == [1, 2, 3, 4, 5]
