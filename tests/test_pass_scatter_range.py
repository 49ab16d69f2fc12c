"""scatter: assignment to a range of tokens, as CogVideoX's rotary embedding writes it, becomes Concat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.hexagon_cases import decibels, graph, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.errors import CompileError
from vdq_export.graph import Graph
from vdq_export.passes import scatter

BATCH, HEADS, TOKENS, WIDTH = 1, 2, 12, 8
TURN = [2, 1, 0, 3]


def assigned(rows: list[int], *, turned: bool = True) -> Graph:
    """x[:, :, rows] = 2·u, scaled by two again behind it; `turned`: with the tokens in front by a permutation."""
    shape, update = [BATCH, HEADS, TOKENS, WIDTH], [BATCH, HEADS, len(rows), WIDTH]
    if not turned:
        shape, update = [TOKENS, HEADS, WIDTH], [len(rows), HEADS, WIDTH]
    nodes = [
        ("Mul", ["x", "two"], "a", {}),
        ("Mul", ["u", "two"], "b", {}),
        *([("Transpose", [v], f"{v}.T", {"perm": TURN}) for v in "ab"] if turned else []),
        ("ScatterND", ["a.T", "rows", "b.T"] if turned else ["a", "rows", "b"], "s", {}),
        *([("Transpose", ["s"], "s.T", {"perm": TURN})] if turned else []),
        ("Mul", ["s.T" if turned else "s", "two"], "y", {}),
    ]
    return graph({"x": shape, "u": update}, nodes, two=np.float32(2), rows=np.array(rows)[:, None])


def feeds(made: Graph) -> dict[str, np.ndarray]:
    return {value.name: noise(*value.shape, seed=i) for i, value in enumerate(made.gs.inputs)}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("rows", [range(4, TOKENS), range(5), range(2, 7), range(TOKENS), [3]])
def test_exact_without_scatter_and_transposes(rows: list[int], turned: bool) -> None:
    made = assigned(list(rows), turned=turned)
    short = with_form(made, "scatter")
    assert {node.op for node in short.nodes} <= {"Mul", "Slice", "Concat"}
    assert np.array_equal(*(ort.run(one, feeds(made))["y"] for one in (made, short)))


@pytest.mark.parametrize("rows", [[4, 6, 8], [5, 4, 3]])
def test_rows_with_gaps_are_left_and_said(rows: list[int]) -> None:
    report = scatter.run(assigned(rows), PassContext())
    assert (report.applied, [skip.why for skip in report.skipped]) == (0, ["not a pair of assignments"])


def test_assignments_one_after_the_other_all_go() -> None:
    """As index_copy of text, video and sound into one row of tokens is traced."""
    shape, ends = [TOKENS, HEADS, WIDTH], (0, 3, 9, TOKENS)
    parts = {f"u{i}": [end - begin, HEADS, WIDTH] for i, (begin, end) in enumerate(pairwise(ends))}
    rows = {f"rows{i}": np.arange(begin, end)[:, None] for i, (begin, end) in enumerate(pairwise(ends))}
    chain = ["x", "a", "b", "c"]
    nodes = [("ScatterND", [chain[i], f"rows{i}", f"u{i}"], chain[i + 1], {}) for i in range(3)]
    made = graph({"x": shape, **parts}, [*nodes, ("Mul", ["c", "two"], "y", {})], two=np.float32(2), **rows)
    short = with_form(made, "scatter")
    assert "ScatterND" not in {node.op for node in short.nodes}
    assert np.array_equal(*(ort.run(one, feeds(made))["y"] for one in (made, short)))
    assert scatter.run(short, PassContext()).applied == 0


@pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
def test_the_compiler_refuses_without_and_takes_with_it() -> None:
    made = assigned(list(range(4, TOKENS)))
    with pytest.raises(CompileError):
        decibels(made, feeds(made))
    assert min(decibels(with_form(made, "scatter"), feeds(made))) > 70
