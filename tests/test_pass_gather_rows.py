"""gather_rows: GatherND, which Hexagon's compiler gets wrong, as Slice or Gather."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hexagon_cases import decibels, graph, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.graph import Graph
from vdq_export.passes import gather_rows

SHAPE = (8, 1, 2, 16)
FEEDS = {"x": noise(*SHAPE)}
CASES = {"Slice": [0, 1, 2, 3, 4, 5, 6], "Gather": [0, 2, 3, 7, 5]}


def taken(rows: list[int]) -> Graph:
    nodes = [
        ("Mul", ["x", "two"], "a", {}),
        ("GatherND", ["a", "rows"], "b", {}),
        ("Transpose", ["b"], "y", {"perm": [1, 2, 0, 3]}),
    ]
    return graph({"x": SHAPE}, nodes, two=np.float32(2), rows=np.array(rows)[:, None])


@pytest.mark.parametrize("op", CASES)
def test_exact_and_once(op: str) -> None:
    made = taken(CASES[op])
    changed = with_form(made, "gather_rows")
    assert [node.op for node in changed.nodes] == ["Mul", op, "Transpose"]
    assert np.array_equal(*(ort.run(one, FEEDS)["y"] for one in (made, changed)))
    assert gather_rows.run(changed, PassContext()).applied == 0


def test_rows_from_the_end_are_left_and_said() -> None:
    report = gather_rows.run(taken([-1, 0]), PassContext())
    assert (report.applied, [skip.where for skip in report.skipped]) == (0, ["b"])


@pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("op", CASES)
def test_the_compiler_is_wrong_without_and_right_with_it(op: str) -> None:
    made = taken(CASES[op])
    cpu, htp = decibels(made, FEEDS)
    assert cpu - htp > 30
    cpu, htp = decibels(with_form(made, "gather_rows"), FEEDS)
    assert cpu - htp < 1.0
