"""Smoothing: what it must refuse, repeat and leave alone; plan scales after folds; planted faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.smoothing_cases import (
    EXACT,
    adaln_net,
    attention_net,
    error,
    norm_net,
    plan_for,
    smoothed,
    with_scale,
)
from vdq_export.contract import PassContext
from vdq_export.errors import PassError, PlanError
from vdq_export.graph import Graph
from vdq_export.passes import _channel_factor as channel
from vdq_export.passes import _commuting_ops, smoothing

# -- contract -----------------------------------------------------------------------------------------------------


def test_idempotent_and_deterministic(tmp_path: Path) -> None:
    graph = adaln_net(12, own=False)
    plan = plan_for(graph)
    after, first = smoothed(graph, plan)
    digest = after.hash()
    assert smoothed(graph, plan)[0].hash() == digest
    again = smoothing.run(after, PassContext(plan=plan))
    assert first.applied and not again.applied and after.hash() == digest
    after.save(tmp_path / "after.onnx")
    loaded = Graph.load(tmp_path / "after.onnx")
    assert not smoothing.run(loaded, PassContext(plan=plan)).applied
    assert error(graph, loaded) < EXACT
    with pytest.raises(PassError, match="other scales"):
        smoothing.run(after, PassContext(plan=plan_for(graph, seed=1)))


def test_nothing_to_do() -> None:
    graph = norm_net(12, "affine")
    digest = graph.hash()
    plans = [None, plan_for(graph, plain=("q", "k")), plan_for(graph, kept=("q", "k"))]
    ones = with_scale(with_scale(plan_for(graph), "q", (1.0,) * 12), "k", (1.0,) * 12)
    for plan in [*plans, ones]:
        report = smoothing.run(graph, PassContext(plan=plan))
        assert (report.applied, report.details, graph.hash()) == (0, [], digest)


def test_layers_on_one_value_must_agree() -> None:
    graph = norm_net(12, "affine")
    plan = plan_for(graph)
    for other in (None, (2.0,) * 12):
        with pytest.raises(PassError, match="norm/LayerNormalization disagree on its smoothing: q, k"):
            smoothing.run(graph.copy(), PassContext(plan=with_scale(plan, "k", other)))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales(bad: float) -> None:
    graph = attention_net(12, 3)
    plan = with_scale(plan_for(graph), "to_out", (bad, *[1.0] * 11))
    with pytest.raises(PlanError, match="to_out: 12 finite scales above 0"):
        smoothing.run(graph, PassContext(plan=plan))


def test_a_layer_the_graph_lacks() -> None:
    with pytest.raises(PlanError, match="to_v, which is no linear"):
        smoothing.run(norm_net(12, "affine"), PassContext(plan=plan_for(attention_net(12, 3))))


# -- shapes of factors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "factor"),
    [
        ((1, 5, 12), (1, 5, 3, 4), (1, 1, 3, 4)),
        ((1, 5, 12), (1, 5, 3, 4), (1, 1, 1, 4)),
        ((1, 5, 3, 4), (1, 5, 12), (1, 1, 12)),
        ((5, 12), (1, 5, 1, 12), (1, 1, 1, 12)),
        ((1, 5, 1, 12), (5, 12), (1, 12)),
        ((60,), (5, 12), (1, 12)),
        ((2, 3, 35), (6, 5, 7), (6, 1, 7)),
        ((4, 6), (3, 8), (1, 8)),
        ((1, 1, 1), (1,), (1,)),
        ((1,), (1, 1), (1, 1)),
        ((7, 1), (1, 7), (1, 7)),
    ],
)
def test_factor_through_reshape(before: tuple[int, ...], after: tuple[int, ...], factor: tuple[int, ...]) -> None:
    random = np.random.default_rng(3)
    x, f = random.normal(size=before), random.normal(size=factor)
    found = channel.before_reshape(f, after, before)
    assert found.ndim == len(before)
    np.testing.assert_array_equal((x * found).reshape(after), x.reshape(after) * f)


# -- planted faults: the check above must see them -----------------------------------------------------------------


@pytest.mark.parametrize("op", ["LayerNormalization", "MatMul", "Split", "Add"])
def test_a_wrong_fold_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """· s instead of ÷ s, in one rule."""
    right = _commuting_ops._RULES[op]
    monkeypatch.setitem(_commuting_ops._RULES, op, lambda node, value, factor: right(node, value, 1 / factor))
    graph = adaln_net(12, own=True)
    assert error(graph, smoothed(graph, plan_for(graph, kept=("time_proj",)))[0]) > 1e-2


def test_a_forgotten_operand_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias of a producer left as it was."""
    right = _commuting_ops._RULES["Add"]
    monkeypatch.setitem(_commuting_ops._RULES, "Add", lambda node, value, factor: [right(node, value, factor)[0][:1]])  # type: ignore[index, list-item]
    graph = attention_net(12, 3)
    assert error(graph, smoothed(graph, plan_for(graph))[0]) > 1e-2
