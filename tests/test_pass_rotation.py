"""Rotation leaves the outputs as they were, on widths 1, odd, prime, 12·2^k, fused and explicit; planted faults."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rotation_cases import (
    HADAMARD,
    explicit,
    fused,
    inserted,
    joint_net,
    layout_net,
    qkv_net,
    readers,
    rotated,
    rotation_plan,
)
from tests.smoothing_cases import EXACT, TOKENS, Net, adaln_net, attention_net, error, gated_net, norm_net
from vdq_export import ort, pipeline, targets
from vdq_export.calib.rotation import choose
from vdq_export.calib.transform import Transform
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph, is_constant
from vdq_export.hadamard import matrix
from vdq_export.passes import _rotation_edits, rotation

WIDTHS = (1, 7, 12, 13, 26, 48, 192)
BOTH = pytest.mark.parametrize("smooth", [False, True], ids=["", "smoothed"])
SCALES = pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])


@BOTH
@SCALES
@pytest.mark.parametrize("width", WIDTHS)
def test_explicit(width: int, scaled: bool, smooth: bool) -> None:
    graph = norm_net(width, "affine")
    after, report = rotated(graph, rotation_plan(graph, scaled=scaled, smooth=smooth))
    assert error(graph, after) <= EXACT
    assert len(explicit(report)) == report.applied == (width >= 12 and width % 4 == 0)
    products = inserted(after, "MatMul")
    assert len(products) == {12: 1, 48: 1, 192: 2}.get(width, 0)
    assert not inserted(after, "Reshape") or width == 192, "one product with [1, K, K] needs none"


@SCALES
@pytest.mark.parametrize(("width", "block"), [(24, 12), (36, 4), (26, 2), (1536, 256), (13, 1), (320, 160)])
def test_explicit_blocks(width: int, block: int, scaled: bool) -> None:
    graph = norm_net(width, "plain")
    after, report = rotated(graph, rotation_plan(graph, block=block, scaled=scaled, smooth=True))
    assert error(graph, after) <= EXACT
    assert len(inserted(after, "MatMul")) == {1: 0, 160: 2, 256: 2}.get(block, 1)
    if block > 1:
        assert explicit(report).keys() == {"norm/LayerNormalization"}


@SCALES
@pytest.mark.parametrize("width", [192, 320])
def test_constants_come_last_where_every_operator_is_an_integer_one(width: int, scaled: bool) -> None:
    """An HTP's integer product takes a constant as its second operand; as the first one it would run in float."""
    graph = norm_net(width, "affine")
    plan = rotation_plan(graph, scaled=scaled)
    after, _ = rotated(graph, plan, targets.load("qnn").spec())
    assert error(graph, after) <= EXACT
    assert (len(inserted(after, "MatMul")), len(inserted(after, "Transpose"))) == (2, 2)
    assert not any(is_constant(node.inputs[0]) for node in after.nodes if node.op == "MatMul")
    plain, _ = rotated(graph, plan)
    assert any(is_constant(node.inputs[0]) for node in plain.nodes if node.op == "MatMul")


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (2, 1, 3, 24), (1, 2, 1, 3, 24)])
@pytest.mark.parametrize("block", [24, 12])
@SCALES
def test_any_rank(shape: tuple[int, ...], block: int, scaled: bool) -> None:
    net = Net(24)
    net.inputs["x"] = list(shape)
    graph = net.graph(net.linear("x", "q"), net.linear("x", "k", n=3))
    after, _ = rotated(graph, rotation_plan(graph, block=block, scaled=scaled))
    assert error(graph, after) <= EXACT
    assert all(len(made) <= 5 for made in inserted(after))
    assert len(inserted(after, "Reshape")) == (0 if block == 24 and len(shape) >= 3 else 2)


@BOTH
@SCALES
@pytest.mark.parametrize(("width", "heads"), [(12, 1), (36, 3), (24, 2), (192, 4), (160, 2), (1152, 2)])
def test_fused_into_to_v(width: int, heads: int, scaled: bool, smooth: bool) -> None:
    graph = attention_net(width, heads)
    plan = rotation_plan(graph, scaled=scaled, smooth=smooth, only=("to_out",))
    after, report = rotated(graph, plan)
    assert fused(report) == {"attn/Reshape_1": "to_v"}
    assert error(graph, after) <= EXACT
    assert [n.op for n in after.nodes] == [n.op for n in graph.nodes], "nothing of it is left at run time"
    assert next(x for x in plan.layers if x.name == "to_out").rotation.block == width // heads  # type: ignore[union-attr]


@BOTH
@pytest.mark.parametrize(("width", "heads"), [(1, 1), (7, 1), (39, 3), (26, 13), (48, 8)])
def test_heads_that_are_no_order_are_rotated_as_chosen(width: int, heads: int, smooth: bool) -> None:
    graph = attention_net(width, heads)
    after, _ = rotated(graph, rotation_plan(graph, smooth=smooth))
    assert error(graph, after) <= EXACT


@pytest.mark.parametrize(("block", "why"), [(24, "divides blocks of 24"), (48, "divides blocks of 48")])
def test_blocks_across_heads_are_not_fused(block: int, why: str) -> None:
    """P differs from head to head: only what stays within one commutes."""
    graph = attention_net(48, 4)
    after, report = rotated(graph, rotation_plan(graph, block=block, only=("to_out",)))
    assert why in explicit(report)["attn/Reshape_1"]
    assert error(graph, after) <= EXACT


@SCALES
@BOTH
def test_blocks_that_share_a_head_are_fused(scaled: bool, smooth: bool) -> None:
    graph = attention_net(48, 2)
    after, report = rotated(graph, rotation_plan(graph, block=12, scaled=scaled, smooth=smooth, only=("to_out",)))
    assert fused(report) == {"attn/Reshape_1": "to_v"}
    assert error(graph, after) <= EXACT


@settings(max_examples=60)
@given(st.data())
def test_any_layout_of_heads(data: st.DataObject) -> None:
    """Whatever a layout does to the channels, fused or not: the outputs stay."""
    heads, dim = data.draw(st.sampled_from([(1, 12), (2, 4), (3, 4), (4, 2), (2, 12)]))
    sizes = data.draw(st.permutations([1, TOKENS, heads, dim]))
    perm = data.draw(st.permutations(range(4)))
    block = data.draw(st.sampled_from([n for n in (2, 4, 8, 12, 24) if heads * dim % n == 0]))
    graph = layout_net(heads, dim, (sizes[0], sizes[1], sizes[2], sizes[3]), perm, data.draw(st.booleans()))
    after, report = rotated(graph, rotation_plan(graph, block=block, only=("to_out",)))
    assert report.applied == 1
    assert error(graph, after) <= EXACT


@BOTH
@SCALES
def test_a_linear_behind_a_linear(scaled: bool, smooth: bool) -> None:
    net = Net(24)
    graph = net.graph(net.linear(net.linear("x", "a"), "b"))
    after, report = rotated(graph, rotation_plan(graph, scaled=scaled, smooth=smooth, only=("b",)))
    assert fused(report) == {"a/Add": "a"}
    assert error(graph, after) <= EXACT


@pytest.mark.parametrize("sliced", [False, True], ids=["Split", "Slice"])
@pytest.mark.parametrize("heads", [1, 3])
@BOTH
@SCALES
def test_two_streams_of_one_attention(heads: int, scaled: bool, smooth: bool, sliced: bool) -> None:
    graph = joint_net(12 * heads, heads, sliced=sliced)
    plan = rotation_plan(graph, scaled=scaled, smooth=smooth, only=("to_out", "to_add_out"))
    after, report = rotated(graph, plan)
    assert error(graph, after) <= EXACT
    if not smooth:  # smoothing's own vectors differ between the streams: a Mul is in the way
        assert fused(report) == dict.fromkeys(("attn/Split", "attn/Split:1"), "to_v, add_v")


@pytest.mark.parametrize("sliced", [False, True], ids=["Split", "Slice"])
def test_one_of_two_streams_alone_is_explicit(sliced: bool) -> None:
    """add_v's rows go to to_out too: turned for one reader, they would be wrong for the other."""
    graph = joint_net(24, 2, sliced=sliced)
    after, report = rotated(graph, rotation_plan(graph, block=12, kept=("to_add_out",), only=("to_out",)))
    other = "attn/Reshape is also read by attn/Split:1" if sliced else "attn/Split:1 is also read by to_add_out/MatMul"
    assert explicit(report) == {"attn/Split": other}
    assert error(graph, after) <= EXACT


def test_a_third_of_a_linears_columns_is_explicit() -> None:
    graph = qkv_net(24, 2)
    after, report = rotated(graph, rotation_plan(graph, block=12, only=("to_out",)))
    assert "q/Split (Split) divides" in explicit(report)["attn/Reshape_1"]
    assert error(graph, after) <= EXACT


@BOTH
@pytest.mark.parametrize(
    "graph", [gated_net(12, True), gated_net(12, False), adaln_net(24, True), adaln_net(24, False)]
)
def test_other_places(graph: Graph, smooth: bool) -> None:
    after, _ = rotated(graph, rotation_plan(graph, smooth=smooth))
    assert error(graph, after) <= EXACT


@SCALES
@BOTH
def test_a_real_transformer(traced: Graph, tiny_feeds: Mapping[str, Array], scaled: bool, smooth: bool) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    plan = rotation_plan(graph, scaled=scaled, smooth=smooth)
    after, report = rotated(graph, plan)
    assert error(graph, after, tiny_feeds) <= EXACT
    heads = {name: who for name, who in fused(report).items() if ".attn" in name}
    assert sorted(heads.values()) == [f"blocks.{b}.attn{a}.to_v" for b in (0, 1) for a in (1, 2)]
    assert report.applied == len({x.value for x in plan.layers if x.rotation}) == 17
    assert not report.skipped


@SCALES
@BOTH
@pytest.mark.parametrize("block", [12, 48])
def test_values_and_weights_are_what_calibration_assumes(block: int, scaled: bool, smooth: bool) -> None:
    """Transform, from which ranges and weight grids come, and the pass must not disagree on H and its transpose."""
    graph = norm_net(48, "affine")
    plan = rotation_plan(graph, block=block, scaled=scaled, smooth=smooth)
    after, _ = rotated(graph, plan)
    transform = Transform.of(plan.layers[0])
    x = np.random.default_rng(0).normal(size=(1, TOKENS, 48)).astype(np.float32)
    value, turned = graph.linears()[0].value.name, after.linears()[0].value.name
    raw = ort.run(graph, {"x": x}, outputs=[value])[value]
    expected = transform(raw)
    actual = ort.run(after, {"x": x}, outputs=[turned])[turned]
    assert np.abs(actual - expected).max() <= EXACT * np.abs(expected).max()
    for old, new in zip(graph.linears(), after.linears(), strict=True):
        wanted = transform.weight(old.weight.values)
        assert np.abs(new.read_weight() - wanted).max() <= EXACT * np.abs(wanted).max()


# -- planted faults --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["rows", "columns", "value"])
def test_a_transposed_rotation_is_caught(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H for Hᵀ in one of the places: H of order 12 is not symmetric."""

    def transposed(x: Array, block: int) -> Array:
        return np.asarray((x.reshape(-1, block) @ matrix(block).T).reshape(x.shape))

    if where == "rows":
        monkeypatch.setattr(_rotation_edits, "unrotate_rows", lambda w, block: transposed(w.T, block).T)
    elif where == "columns":
        monkeypatch.setattr(_rotation_edits, "rotate", transposed)
    else:
        monkeypatch.setattr(_rotation_edits, "factors", lambda n: (np.eye(1, dtype=np.float32), matrix(n).T))
    graph = norm_net(24, "affine") if where == "value" else attention_net(24, 2)
    after, _ = rotated(graph, rotation_plan(graph, block=12, only=() if where == "value" else ("to_out",)))
    assert error(graph, after) > 1000 * EXACT


def test_a_wrong_head_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two heads put into to_v all the same."""
    graph = attention_net(48, 4)
    to_v = next(x.name for x in graph.linears() if x.name == "to_v")

    def careless(edited: Graph, wanted: list[object]) -> list[object]:
        return [tuple(x for x in edited.linears() if x.name == to_v) for _ in wanted]

    monkeypatch.setattr(rotation, "carriers", careless)
    after, report = rotated(graph, rotation_plan(graph, block=24, only=("to_out",)))
    assert fused(report) == {"attn/Reshape_1": "to_v"}
    assert error(graph, after) > 1000 * EXACT


def test_a_forgotten_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    change = _rotation_edits._change
    monkeypatch.setattr(
        _rotation_edits, "_change", lambda g, n, i, f, m="": change(g, n, i, f, m) if n.op == "MatMul" else None
    )
    graph = attention_net(24, 2)
    after, _ = rotated(graph, rotation_plan(graph, only=("to_out",)))
    assert error(graph, after) > 1000 * EXACT


def test_what_is_chosen_as_free_is_fused() -> None:
    for graph in (attention_net(24, 2), joint_net(24, 2), qkv_net(24, 2), norm_net(24, "affine"), gated_net(12, False)):
        chosen = choose(graph, readers(graph), HADAMARD)
        _, report = rotated(graph, rotation_plan(graph))
        assert fused(report).keys() == {name for name, (_, why) in chosen.items() if "free" in why}
