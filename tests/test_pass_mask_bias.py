"""mask_bias: masks that leave the scores beside them their 16 bits."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hexagon_cases import decibels, graph, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.graph import Array, Graph
from vdq_export.passes import mask_bias

HEADS, QUERIES, KEYS = 2, 16, 24
SCORES = (1, HEADS, QUERIES, KEYS)
MASK = np.ones((1, KEYS), np.float32)
MASK[:, -7:] = 0
FEEDS = {"s": 3 * noise(*SCORES), "m": MASK}


def product(number: float = -10000.0) -> Graph:
    """diffusers' (1 - mask) * -10000, repeated over the heads."""
    nodes = [
        ("Sub", ["one", "m"], "Sub", {}),
        ("Mul", ["Sub", "number"], "Mul", {}),
        ("Unsqueeze", ["Mul", "axes"], "Unsqueeze", {}),
        ("Add", ["s", "Unsqueeze"], "Add", {}),
        ("Softmax", ["Add"], "y", {"axis": -1}),
    ]
    return graph({"s": SCORES, "m": MASK.shape}, nodes, one=np.float32(1), number=np.float32(number),
                 axes=np.array([1, 2]))  # fmt: skip


def choice(number: float = float("-inf")) -> Graph:
    """torch's scaled_dot_product_attention with a boolean mask."""
    nodes = [
        ("Greater", ["m", "half"], "keep", {}),
        ("Where", ["keep", "zero", "number"], "Where", {}),
        ("Add", ["s", "Where"], "Add", {}),
        ("Softmax", ["Add"], "y", {"axis": -1}),
    ]
    return graph({"s": SCORES, "m": MASK.shape}, nodes, half=np.float32(0.5), zero=np.float32(0),
                 number=np.float32(number))  # fmt: skip


CASES = {"product": product(), "choice": choice(), "choice of the lowest float": choice(float(np.finfo("f4").min))}


def test_torchs_guard_against_rows_without_a_key_goes() -> None:
    nodes = [
        ("Softmax", ["s"], "p", {"axis": -1}),
        ("IsNaN", ["p"], "nan", {}),
        ("Where", ["nan", "zero", "p"], "guarded", {}),
        ("Add", ["guarded", "zero"], "y", {}),
    ]
    made = graph({"s": SCORES}, nodes, zero=np.float32(0))
    short = with_form(made, "mask_bias")
    assert [node.op for node in short.nodes] == ["Softmax", "Add"]
    assert np.array_equal(result(short, {"s": FEEDS["s"]}), result(made, {"s": FEEDS["s"]}))


def result(made: Graph, feeds: dict[str, Array] = FEEDS) -> Array:
    return ort.run(made, feeds)["y"]


@pytest.mark.parametrize("name", CASES)
def test_exact_and_once(name: str) -> None:
    made = CASES[name].copy()
    assert mask_bias.run(made, PassContext()).applied == 1
    assert np.abs(result(made) - result(CASES[name])).max() <= 1e-6
    assert result(made)[..., -7:].max() < 1e-20
    assert mask_bias.run(made, PassContext()).applied == 0


def test_scores_may_lie_forty_apart() -> None:
    """The condition of the docstring, and that it is one: 80 apart, a masked score is seen."""
    made = with_form(product(), "mask_bias")
    for gap, small in ((40.0, True), (80.0, False)):
        scores = np.where(MASK == 0, gap, 0.0) + np.zeros(SCORES)
        feeds = {"s": scores.astype(np.float32), "m": MASK}
        assert bool(np.abs(result(made, feeds) - result(product(), feeds)).max() <= 1e-5) is small


def test_a_row_that_is_masked_altogether_keeps_its_softmax() -> None:
    feeds = {"s": FEEDS["s"], "m": np.zeros_like(MASK)}
    assert np.abs(result(with_form(product(), "mask_bias"), feeds) - result(product(), feeds)).max() < 1e-3


def test_numbers_that_are_no_mask_are_left() -> None:
    assert mask_bias.run(product(-8.0), PassContext()).applied == 0
    read_twice = product()
    read_twice.gs.outputs.append(read_twice.values()["Mul"])
    report = mask_bias.run(read_twice, PassContext())
    assert (report.applied, [skip.where for skip in report.skipped]) == (0, ["Mul"])


@pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
@pytest.mark.parametrize("name", CASES)
def test_scores_keep_their_precision_on_the_htp(name: str) -> None:
    if name == "product":
        coarse = decibels(CASES[name], FEEDS)
        assert max(coarse) < 40, "steps of 0.15 in an exponent"
    fine = decibels(with_form(CASES[name], "mask_bias"), FEEDS)
    assert min(fine) > 55
