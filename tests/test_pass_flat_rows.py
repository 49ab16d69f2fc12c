"""flat_rows: operators that Hexagon's compiler leaves to the CPU above rank 4."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hexagon_cases import decibels, graph, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.errors import CompileError
from vdq_export.graph import Graph
from vdq_export.passes import flat_rows

SHAPE = (1, 2, 4, 4, 16)
FEEDS = {"x": noise(*SHAPE)}
NORM = graph(
    {"x": SHAPE}, [("LayerNormalization", ["x", "g"], "norm/Norm", {"axis": -1})], g=1 + 0.1 * noise(16, seed=1)
)
LINEAR = graph(
    {"x": SHAPE},
    [("MatMul", ["x", "w"], "proj/MatMul", {}), ("Add", ["proj/MatMul", "b"], "proj/Add", {})],
    w=noise(16, 24, seed=2), b=noise(24, seed=3),
)  # fmt: skip
CASES = {"LayerNormalization": NORM, "linear": LINEAR}


@pytest.mark.parametrize("name", CASES)
def test_exact_once_and_still_a_linear(name: str) -> None:
    made = CASES[name].copy()
    assert flat_rows.run(made, PassContext()).applied == 1
    (expected,), (actual,) = ort.run(CASES[name], FEEDS).items(), ort.run(made, FEEDS).items()
    assert actual[0] == expected[0]
    assert actual[1].shape == expected[1].shape
    assert np.abs(actual[1] - expected[1]).max() <= 1e-5 * np.abs(expected[1]).max()
    assert [(one.name, one.bias is not None) for one in made.linears()] == (
        [("proj", True)] if name == "linear" else []
    )
    assert flat_rows.run(made, PassContext()).applied == 0


@pytest.mark.parametrize("name", CASES)
def test_rank_four_is_left(name: str) -> None:
    made = CASES[name].copy()
    flat_rows.run(made, PassContext())
    assert max(len(n.inputs[0].shape) for n in made.nodes if n.op in ("MatMul", "LayerNormalization")) == 3


def test_a_norm_over_two_axes_is_left_and_said() -> None:
    gain = np.ones((4, 16), np.float32)
    made = graph({"x": SHAPE}, [("LayerNormalization", ["x", "g"], "y", {"axis": -2})], g=gain)
    report = flat_rows.run(made, PassContext())
    assert (report.applied, [skip.where for skip in report.skipped]) == (0, ["y"])


@pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
def test_the_compiler_refuses_without_and_takes_with_it() -> None:
    """The norm; a linear's weight is quantized by another pass, so its refusal is seen on the Cosmos model."""
    made: Graph = NORM
    with pytest.raises(CompileError, match="LayerNormalization norm/Norm"):
        decibels(made, FEEDS)
    found = decibels(with_form(made, "flat_rows"), FEEDS)
    assert found.cpu - found.htp < 1.0
