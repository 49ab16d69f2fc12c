"""Smoothing: each of the five places, exact against the untouched graph, and what other readers of a value force.

Tolerance: 1e-5 of the largest output. Two float32 roundings a channel (÷ s, · s) give about 1e-7 · sqrt(K) ≤ 2e-6 at
K = 192; a factor forgotten or inverted in one place gives 1e-1 and more (test_pass_smoothing_contract).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from tests.smoothing_cases import (
    EXACT,
    TOKENS,
    WIDTHS,
    Net,
    adaln_net,
    attention_net,
    error,
    gated_net,
    inserted,
    norm_net,
    places,
    plan_for,
    smoothed,
)
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph
from vdq_export.passes import smoothing

# -- the five places ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["affine", "ones", "rms"])
def test_place_1_norm_weight(width: int, kind: str) -> None:
    graph = norm_net(width, kind)
    after, report = smoothed(graph, plan_for(graph))
    assert list(places(report).values()) == [1]
    assert report.applied == 1 and not inserted(after) and len(after.nodes) == len(graph.nodes)
    assert error(graph, after) < EXACT


@pytest.mark.parametrize(("width", "heads"), [(1, 1), (7, 1), (7, 7), (12, 3), (13, 13), (192, 6)])
def test_place_2_through_attention(width: int, heads: int) -> None:
    graph = attention_net(width, heads)
    after, report = smoothed(graph, plan_for(graph))
    assert places(report) == {"x": 5, "attn/Reshape_1": 2}
    assert inserted(after) == [[1, TOKENS, width]]
    assert error(graph, after) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_place_2_gated_ffn(width: int, fused: bool, constant: bool) -> None:
    graph = gated_net(width, fused)
    if not constant:  # without the trailing constant the producer itself has to take it
        down = next(n for n in graph.nodes if n.name == "down/MatMul")
        down.inputs[0] = next(n for n in graph.nodes if n.name == "ffn/Mul").outputs[0]
        graph.cleanup()
    after, report = smoothed(graph, plan_for(graph))
    assert sorted(places(report).values()) == [2, 5]
    assert inserted(after) == [[1, TOKENS, width]]
    assert error(graph, after) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_place_3_shared_modulation(width: int) -> None:
    graph = adaln_net(width, own=False)
    after, report = smoothed(graph, plan_for(graph, kept=("time_proj",)))
    assert places(report) == {"b0/Add_2": 3, "b1/Add_2": 3}
    assert inserted(after) == [[1, 1, width]] * 2  # a per-sample vector each, never the tokens
    assert any("not 4: six is also read by b1/Add" in line for line in report.details)
    assert error(graph, after) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_place_4_own_modulation_linear(width: int) -> None:
    graph = adaln_net(width, own=True)
    after, report = smoothed(graph, plan_for(graph, kept=("time_proj",)))
    assert places(report) == {"b0/Add_2": 4}
    assert not inserted(after) and len(after.nodes) == len(graph.nodes)
    assert error(graph, after) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_place_3_and_4_when_the_norm_has_other_readers(width: int) -> None:
    """x̂ read twice: its weight cannot take ÷ s, so 1 + γ does: in the linear (own) or as a vector (shared)."""
    for own, expected, muls in ((True, 4, []), (False, 3, [[1, 1, width]] * 4)):
        graph = adaln_net(width, own)
        for norm in [n for n in graph.nodes if n.op == "LayerNormalization"]:
            extra = graph.add_node(
                "Relu", [norm.outputs[0]], f"{norm.name}.relu", dtype=np.float32, shape=[1, TOKENS, width]
            )
            graph.gs.outputs.append(extra)
        graph.cleanup()
        after, report = smoothed(graph, plan_for(graph, kept=("time_proj",)))
        assert set(places(report).values()) == {expected}
        # With one channel the vectors are as small as can be, but not smaller than nothing: still never the tokens.
        assert inserted(after) == muls
        assert error(graph, after) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_place_5_tokens_with_cost_and_reasons(width: int) -> None:
    net = Net(width)
    hidden = net.op("Gelu", net.linear("x", "up"), name="ffn/Gelu")
    graph = net.graph(net.linear(hidden, "down"))
    after, report = smoothed(graph, plan_for(graph, plain=("up",)))
    assert inserted(after) == [[1, TOKENS, width]]
    line = report.details[0]
    assert f"place 5 (tokens, {TOKENS * width} elements a run) for down" in line
    for reason in ("not 1: ", "not 2: ffn/Gelu (Gelu) does not commute", "not 4: ", "not 3: "):
        assert reason in line
    assert report.details[-1] == f"multiplied a run: {TOKENS * width} elements of tokens, 0 of per-sample vectors"
    assert error(graph, after) < EXACT


# -- other readers ------------------------------------------------------------------------------------------------


def test_a_float_linear_on_the_same_value_is_multiplied_too() -> None:
    graph = norm_net(13, "affine")
    after, report = smoothed(graph, plan_for(graph, kept=("k",)))
    assert list(places(report).values()) == [1]
    assert error(graph, after) < EXACT


@pytest.mark.parametrize("as_output", [False, True])
def test_any_other_reader_forces_the_tokens_and_is_untouched(as_output: bool) -> None:
    net = Net(13)
    y = net.op("LayerNormalization", "x", net.normal("w", 13), name="norm/LN")
    other = y if as_output else net.op("Add", y, "x", name="residual")
    graph = net.graph(net.linear(y, "q"), net.linear(y, "kept"), other)
    after, report = smoothed(graph, plan_for(graph, kept=("kept",)))
    assert places(report) == {y: 5}
    reason = "is also an output of the graph" if as_output else "is also read by residual"
    assert reason in report.details[0]
    assert [o.name for o in after.gs.outputs] == [o.name for o in graph.gs.outputs]
    kept = {x.name: x.weight for x in after.linears()}["kept"]
    before = {x.name: x.weight for x in graph.linears()}["kept"]
    assert kept.name == "kept.weight" and np.shares_memory(kept.values, before.values)  # reads the value as it was
    assert error(graph, after) < EXACT


def test_operands_read_twice() -> None:
    """relu(x)² and x + x: scaling the operand once would count twice."""
    for kind in ("Mul", "Add"):
        net = Net(12)
        hidden = net.op("Relu", net.linear("x", "up"), name="relu")
        graph = net.graph(net.linear(net.op(kind, hidden, hidden, name="twice"), "down"))
        after, _ = smoothed(graph, plan_for(graph))
        assert error(graph, after) < EXACT


def test_tied_constants_keep_their_value_for_others() -> None:
    """One weight in two linears, one bias in producer and bystander, one norm weight in two norms."""
    net = Net(12)
    net.normal("w", 12, 12), net.normal("b", 12), net.normal("g", 12)
    a = net.op("LayerNormalization", "x", "g", name="a/LN")
    one = net.op("Add", net.op("MatMul", a, "w", name="one/MatMul"), "b", name="one/Add")
    two = net.op("Add", net.op("MatMul", one, "w", name="two/MatMul"), "b", name="two/Add")
    graph = net.graph(two, net.op("LayerNormalization", "x", "g", name="c/LN"))
    after, report = smoothed(graph, plan_for(graph))
    assert places(report) == {"a/LN": 1, "one/Add": 2}
    assert error(graph, after) < EXACT


def test_concat_of_tokens_scales_each_part() -> None:
    net = Net(13)
    text = net.given("text", 1, 3, 13)
    both = net.op("Concat", net.linear("x", "img"), net.linear(text, "txt"), name="joint", axis=1)
    graph = net.graph(net.linear(both, "out"))
    after, report = smoothed(graph, plan_for(graph, plain=("img", "txt")))
    assert places(report) == {"joint": 2} and not inserted(after)
    assert error(graph, after) < EXACT


# -- a whole model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    return graph


def test_whole_model(canonical: Graph, tiny_feeds: Mapping[str, Array]) -> None:
    plan = plan_for(canonical)
    after, report = smoothed(canonical, plan)
    assert error(canonical, after, tiny_feeds) < EXACT
    found = places(report)
    assert len(found) == report.applied == len({x.value.name for x in canonical.linears()})
    by_layer = {x.name: found[x.value.name] for x in canonical.linears()}
    for block in ("blocks.0.", "blocks.1."):
        taken = {name.removeprefix(block): place for name, place in by_layer.items() if name.startswith(block)}
        assert taken == {
            "attn1.to_q": 3, "attn1.to_k": 3, "attn1.to_v": 3, "attn1.to_out.0": 2,
            "attn2.to_q": 1, "attn2.to_k": 2, "attn2.to_v": 2, "attn2.to_out.0": 2,
            "ffn.net.0.proj": 3, "ffn.net.2": 5,
        }  # fmt: skip
    assert smoothing.run(after, PassContext(plan=plan)).applied == 0
