"""A graph run segment by segment is the graph: the same bits, whatever the budget."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from tests import calib_cases as cases
from tests import tiny_model
from vdq_export import ort, pipeline
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError, ModelError, PassError
from vdq_export.graph import Graph, bind, is_promise
from vdq_export.graphs import segments
from vdq_export.graphs.segments import Running, Segment, SegmentedNetwork, extract, feed, split
from vdq_export.model import Model
from vdq_export.tracing.weightless import trace_weightless


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    made = traced.copy()
    pipeline.run_passes(made, pipeline.canonical("ort-int8"), PassContext())
    return made


def run(graph: Graph, chain: list[Segment], feeds: dict[str, Any]) -> dict[str, Any]:
    held = dict(feeds)
    for one in chain:
        held |= Running(extract(graph, one), threads=1)(held)
    return held


@pytest.mark.parametrize("budget", [1, 3_000, 20_000, 10**9])
def test_same_bits_as_the_whole_graph(canonical: Graph, budget: int) -> None:
    feeds = {name: tensor.numpy() for name, tensor in tiny_model.inputs(3, 300.0).items()}
    inner = {linear.value.name: 1 for linear in canonical.linears() if linear.value.inputs}
    options = {"session.disable_prepacking": "1"}  # as observation does: packed weights round otherwise
    whole = ort.run(canonical, feeds, list(inner), threads=1, exact=True, options=options)
    chain = split(canonical, budget, inner)
    found = run(canonical, chain, feeds)
    assert {name for name, array in whole.items() if not np.array_equal(found[name], array)} == set()
    assert (len(chain) == 1) == (budget == 10**9)
    assert [one.start for one in chain[1:]] == [one.stop for one in chain[:-1]]


def test_a_cut_graph_lacks_nothing_and_its_weights_stay_below_the_budget(canonical: Graph) -> None:
    chain = split(canonical, 20_000)
    given = {v.name for v in canonical.gs.inputs}
    for one in chain:
        assert set(one.inputs) <= given
        given |= set(one.outputs)
        single = one.stop == one.start + 1
        assert one.weights <= 20_000 or single
        assert sum(c.values.nbytes for c in extract(canonical, one).constants()) <= one.weights
    assert {v.name for v in canonical.gs.outputs} <= given


def brute(heavy: list[int], crossing: list[float], budget: int) -> float:
    count = len(heavy) - 1
    best = np.inf
    for size in range(count):
        for cuts in combinations(range(1, count), size):
            ends = [0, *cuts, count]
            fits = all(heavy[b] - heavy[a] <= budget or b == a + 1 for a, b in pairwise(ends))
            best = min(best, sum(crossing[c] for c in cuts)) if fits else best
    return float(best)


def test_cuts_are_the_cheapest_there_are() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 9))
        heavy = [0, *np.cumsum(rng.integers(0, 5, count)).tolist()]
        crossing = [0.0, *rng.integers(1, 9, count - 1).astype(float).tolist(), 0.0]
        chain = segments._cheapest(heavy, [0] * (count + 1), crossing, 6, 1)
        assert sum(crossing[start] for start, _ in chain[1:]) == brute(heavy, crossing, 6)


def test_segments_return_a_bounded_amount_of_what_is_shown(canonical: Graph) -> None:
    shown = {linear.value.name: 100 for linear in canonical.linears() if linear.value.inputs}
    chain = split(canonical, 10**9, shown, limit=300)
    sizes = [sum(v.name in shown for n in canonical.nodes[one.start : one.stop] for v in n.outputs) for one in chain]
    assert max(sizes) == 3 and sum(sizes) == len(shown)


def test_values_of_unknown_shape_are_never_cut() -> None:
    graph = cases.graph()
    graph.values()["attn/Softmax"].shape = None
    chain = split(graph, 1)
    assert not any("attn/Softmax" in one.outputs for one in chain)
    for value in graph.values().values():
        if value.inputs:
            value.dtype = None
    with pytest.raises(PassError, match="cannot be cut"):
        split(graph, 1)


def test_promised_weights_are_read_by_copies_only(tiny: Model) -> None:
    graph = trace_weightless(tiny_model.wan, tiny.example_inputs)
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    bind(graph, {name: tensor.detach().numpy().astype(np.float64) for name, tensor in tiny.module.named_parameters()})
    promised = sum(is_promise(one) for one in graph.constants())
    network = SegmentedNetwork(graph, budget=20_000, threads=1)
    assert len(network.segments) > 3 and promised > 20
    step = tiny_model.inputs(3, 300.0)
    assert torch.allclose(network(**step), tiny(**step), atol=1e-5)
    assert sum(is_promise(one) for one in graph.constants()) == promised
    assert all(is_promise(one) or one.values.nbytes < 8192 for part in network._parts for one in part.constants())


class Kept(dict[str, bytes]):
    """A store that counts what it was given."""

    def put(self, key: str, data: bytes) -> None:
        assert key not in self
        self[key] = data


def test_a_stored_call_is_not_made_again(canonical: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    store, step = Kept(), tiny_model.inputs(3, 300.0)
    first = SegmentedNetwork(canonical, budget=20_000, store=store, threads=1)(**step)
    again = SegmentedNetwork(canonical, budget=20_000, store=store, threads=1)
    monkeypatch.setattr(segments, "Running", None)
    assert torch.equal(again(**step), first) and len(store) == 1
    with pytest.raises(TypeError):
        again(**{**step, "timestep": torch.tensor([301.0])})


def test_input_that_is_missing(canonical: Graph) -> None:
    step = tiny_model.inputs(3, 300.0)
    del step["timestep"]
    with pytest.raises(ModelError, match="without timestep"):
        SegmentedNetwork(canonical)(**step)


def test_provider_that_is_not_there(canonical: Graph) -> None:
    with pytest.raises(CalibrationError, match=r"no CUDAExecutionProvider here: it offers .*CPU") as caught:
        SegmentedNetwork(canonical, provider="CUDAExecutionProvider")
    assert caught.value.hint == "pip install onnxruntime-gpu"


def arrays() -> Iterator[Any]:
    yield np.zeros((), np.int64)
    yield np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    yield np.ones((2, 0), bool)


@pytest.mark.parametrize("array", arrays(), ids=str)
def test_arrays_survive_packing(array: Any) -> None:
    again = segments.unpack(segments.pack(array))
    assert again.dtype == array.dtype and again.shape == array.shape and np.array_equal(again, array)


def test_bfloat16_is_fed_as_the_graph_wants_it() -> None:
    assert feed(torch.ones(2, dtype=torch.bfloat16), "tensor(float)").dtype == np.float32
