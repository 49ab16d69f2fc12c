"""Which values are rotated in which blocks, and the reason given; on hand-made graphs and a traced transformer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rotation_cases import HADAMARD, joint_net, qkv_net, readers
from tests.smoothing_cases import Net, attention_net, gated_net, norm_net
from vdq_export import pipeline
from vdq_export.calib.rotation import SMALLEST, choose
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.hadamard import is_order
from vdq_export.recipe import RotationRecipe


def chosen(graph: Graph, settings: RotationRecipe = HADAMARD, kept: tuple[str, ...] = ()) -> dict[str, tuple[int, str]]:
    """{value: (block or 0, why)}"""
    found = choose(graph, readers(graph, kept), settings)
    assert found.keys() == readers(graph, kept).keys()
    assert all(rotation is None or rotation.why == why for rotation, why in found.values())
    assert all(rotation is None or rotation.scale == () for rotation, _ in found.values())
    return {name: (rotation.block if rotation else 0, why) for name, (rotation, why) in found.items()}


def with_settings(block: int = 0, match: tuple[str, ...] = ("*",)) -> RotationRecipe:
    return RotationRecipe(kind="hadamard", block=block, match=match)


def test_a_recipe_without_rotation() -> None:
    assert chosen(norm_net(24, "affine"), RotationRecipe()) == {
        "norm/LayerNormalization": (0, "the recipe rotates nothing")
    }


def test_heads_get_a_block_each_whatever_the_recipes_size() -> None:
    for block in (0, 4, 24):
        found = chosen(attention_net(48, 4), with_settings(block))
        assert found["attn/Reshape_1"] == (12, "blocks of 12, free: the columns of to_v take them")


def test_heads_of_no_order_are_rotated_at_run_time() -> None:
    block, why = chosen(attention_net(28, 2))["attn/Reshape_1"]
    assert block == 28
    assert why.startswith(
        "blocks of 28, the largest in a width of 28, at run time: attn/Transpose_1 (Transpose) divides"
    )


def test_streams_of_one_attention_are_decided_together() -> None:
    free = "blocks of 12, free: the columns of to_v, add_v take them"
    both = chosen(joint_net(24, 2))
    assert both["attn/Split"] == both["attn/Split:1"] == (12, free)
    block, why = chosen(joint_net(24, 2), kept=("to_add_out",))["attn/Split"]
    assert (block, why.split("at run time: ")[1]) == (24, "attn/Split:1 is also read by to_add_out/MatMul")


def test_a_value_with_other_readers_is_not_free() -> None:
    net = Net(24)
    y = net.linear("x", "v")
    graph = net.graph(net.linear(y, "q"), net.linear(y, "k"))
    assert chosen(graph)["v/Add"] == (24, "blocks of 24, free: the columns of v take them")
    block, why = chosen(graph, kept=("k",))["v/Add"]
    assert (block, why.split(", at run time: ")[1]) == (24, "v/Add is also read by k/MatMul")


def test_fused_qkv_is_rotated_at_run_time() -> None:
    assert "at run time" in chosen(qkv_net(24, 2))["attn/Reshape_1"][1]


@pytest.mark.parametrize(
    ("width", "block"), [(1, 0), (7, 0), (13, 0), (26, 0), (12, 12), (36, 36), (192, 192), (70, 0)]
)
def test_widths(width: int, block: int) -> None:
    found, why = chosen(norm_net(width, "plain"))["norm/LayerNormalization"]
    assert found == block
    assert str(width) in why


@given(st.integers(1, 200), st.integers(0, 64))
def test_blocks_fit_and_keep_to_the_recipes_size(width: int, most: int) -> None:
    net = Net(width)
    graph = net.graph(net.linear("x", "q"))
    block, why = chosen(graph, with_settings(most))["x"]
    assert why
    if block:
        assert block >= SMALLEST
        assert width % block == 0
        assert is_order(block)
        assert not most or block <= most
    if most >= SMALLEST and is_order(most) and width % most == 0:
        assert block == most


@pytest.mark.parametrize(
    ("match", "rotated"),
    [(("*",), True), (("q", "k"), True), (("[qk]",), True), (("q",), False), ((), False), (("blocks.*",), False)],
)
def test_all_readers_must_match(match: tuple[str, ...], rotated: bool) -> None:
    block, why = chosen(norm_net(24, "affine"), with_settings(match=match))["norm/LayerNormalization"]
    assert bool(block) == rotated
    assert rotated or "is not among the recipe's" in why


def test_match_of_one_stream_alone_is_explicit_for_it() -> None:
    found = chosen(joint_net(24, 2), with_settings(match=("to_out",)))
    assert found["attn/Split:1"][0] == 0
    assert "at run time" in found["attn/Split"][1]


def test_nonlinear_producers() -> None:
    found = chosen(gated_net(14, False))
    assert found["ffn/Mul_1"] == (0, "no Hadamard matrix of 4 or more rows fits a width of 29")


def test_a_real_transformer(traced: Graph) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    before = graph.hash()
    found = chosen(graph)
    assert graph.hash() == before
    free = {linear.name: why for linear in graph.linears() if "free" in (why := found[linear.value.name][1])}
    for block in (0, 1):
        for attention in ("attn1", "attn2"):
            name = f"blocks.{block}.{attention}"
            assert free.pop(f"{name}.to_out.0") == f"blocks of 12, free: the columns of {name}.to_v take them"
    # the prompt's last linear is read by to_k and to_v of both cross attentions and by nobody else
    assert sorted(free) == [f"blocks.{b}.attn2.to_{x}" for b in (0, 1) for x in "kv"]
    assert found["blocks.0.ffn.net.0/Gelu"][0] == 0, "70 = 2 · 35"
    assert sum(block == 0 for block, _ in found.values()) == 2
