"""batch_broadcast: what Hexagon's compiler gets silently wrong, and the form that it gets right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hexagon_cases import Decibels, decibels, graph, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.graph import Graph
from vdq_export.passes import batch_broadcast

B, S, C = 4, 16, 48
GAIN = 1 + 0.1 * noise(C, seed=9)
CLOSE_DB = 1.0  # emulator against onnxruntime: rounding of 16-bit operators alone
needs_htp = pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")


def normed(op: str, shape: tuple[int, ...], computed: bool = False, x: tuple[int, ...] = (B, S, C)) -> Graph:
    """LayerNormalization(op(x, c[shape]))"""
    operand = noise(*shape, seed=1) + (2 if op in ("Mul", "Div") else 0)
    nodes = [(op, ["x", "c"], "sum", {}), ("LayerNormalization", ["sum", "gain"], "y", {"axis": -1})]
    if computed:
        return graph({"x": x, "c": shape}, nodes, gain=GAIN)
    return graph({"x": x}, nodes, c=operand, gain=GAIN)


def expanded() -> Graph:
    nodes = [
        ("Expand", ["z", "shape"], "c", {}),
        ("Add", ["x", "c"], "sum", {}),
        ("LayerNormalization", ["sum", "gain"], "y", {"axis": -1}),
    ]
    return graph({"x": (B, S, C), "z": (1, S, C)}, nodes, gain=GAIN, shape=np.array([B, S, C]))


def feeds(made: Graph) -> dict[str, np.ndarray]:
    return {v.name: noise(*v.shape, seed=2 + i) for i, v in enumerate(made.gs.inputs)}


def values(made: Graph) -> np.ndarray:
    return ort.run(made, feeds(made), exact=True)["y"]  # with fusions off: they round in another order


WRONG = {
    "Add a constant": normed("Add", (1, S, C)),
    "Mul by a constant": normed("Mul", (1, S, C)),
    "Mul by one number a token": normed("Mul", (1, S, 1)),
    "Add of lower rank": normed("Add", (S, C)),
    "Add a computed value": normed("Add", (1, S, C), computed=True),
    "Add what Expand repeated": expanded(),
    "rank 4": normed("Add", (1, 1, S, C), x=(1, B, S, C)),
}
RIGHT = {
    "one channel vector": normed("Add", (C,)),
    "one vector a sample": normed("Mul", (B, 1, C)),
    "nothing broadcast": normed("Add", (B, S, C)),
    "Sub": normed("Sub", (1, S, C)),
    "Div": normed("Div", (1, S, C)),
}


def apart(found: Decibels) -> float:
    return found.cpu - found.htp


@needs_htp
@pytest.mark.parametrize("name", WRONG)
def test_the_compiler_is_wrong_without_and_right_with_it(name: str) -> None:
    made = WRONG[name]
    assert apart(decibels(made, feeds(made))) > 30, "the compiler has learnt it: the form is no longer needed"
    assert apart(decibels(with_form(made, "batch_broadcast"), feeds(made))) < CLOSE_DB


@needs_htp
@pytest.mark.parametrize("name", RIGHT)
def test_the_compiler_is_right_where_the_form_does_nothing(name: str) -> None:
    made = RIGHT[name]
    assert batch_broadcast.run(made.copy(), PassContext()).applied == 0
    assert apart(decibels(made, feeds(made))) < CLOSE_DB


@pytest.mark.parametrize("name", WRONG)
def test_exact_and_once(name: str) -> None:
    made = WRONG[name]
    changed = made.copy()
    assert batch_broadcast.run(changed, PassContext()).applied == 1
    assert np.array_equal(values(made), values(changed))
    assert batch_broadcast.run(changed, PassContext()).applied == 0


def test_only_the_one_axis_is_repeated() -> None:
    made = normed("Mul", (1, 1, S, 1), x=(2, B, S, C))
    batch_broadcast.run(made, PassContext())
    assert made.values()["c.repeated"].shape == (1, B, S, 1)


def test_large_constants_are_repeated_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_broadcast, "LIMIT_BYTES", 4 * B * S * C - 1)
    for made in (normed("Add", (1, S, C)), normed("Add", (S, C))):
        changed = made.copy()
        batch_broadcast.run(changed, PassContext())
        assert [n.op for n in changed.nodes][-3:] == ["Tile", "Add", "LayerNormalization"]
        assert np.array_equal(values(made), values(changed))
