"""Run-time quantizers against their definitions, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests import calib_cases as cases
from vdq_export import ort
from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.ranges import Grid, affine, fake_quantize
from vdq_export.graph import Graph
from vdq_export.passes import dynamic_quantize
from vdq_export.plan import Dynamic, LayerPlan, Range, WeightPlan

Array = np.ndarray[Any, Any]
GRID = Grid("uint8", 6)
ELEMENTS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ROWS = arrays(
    np.float32, (3, 64), elements=st.floats(-(2.0**20), 2.0**20, width=32).map(lambda x: x * (abs(x) > 2**-20))
)


def mx(block: Array, ratio: float, offset: int, saturate_at: float = 6.0) -> Array:
    """One block of 32, in float64, nearest by enumeration; `saturate_at` 8 is the ceiling rule, a planted fault."""
    largest = np.abs(block).max() * np.float32(ratio)
    if not largest:
        return block
    exponent = np.floor(np.log2(largest)) - 2 + offset
    exponent += largest > saturate_at * 2.0**exponent if saturate_at != 6 else 0
    distance = np.abs(np.abs(block)[:, None] / 2.0**exponent - ELEMENTS)
    least = distance.min(axis=1)
    ties = np.isclose(distance, least[:, None], rtol=0, atol=1e-12)
    even = np.array([True, False] * 4)  # mantissa bit 0
    pick = np.where(ties.sum(axis=1) == 2, (ties & even).argmax(axis=1), distance.argmin(axis=1))
    return np.sign(block) * ELEMENTS[pick] * 2.0**exponent


@settings(deadline=None)
@given(rows=ROWS, ratio=st.sampled_from([1.0, 0.75, 0.6]), offset=st.sampled_from([-1, 0, 1]))
def test_mx_is_the_nearest_element_under_the_floor_exponent(rows: Array, ratio: float, offset: int) -> None:
    found = quantize_rows(rows, Dynamic(kind="mx", ratio=ratio, offset=offset, why=""), GRID)
    blocks = rows.astype(np.float64).reshape(-1, 32)
    np.testing.assert_array_equal(found.reshape(-1, 32), [mx(b, ratio, offset) for b in blocks])


def test_mx_saturates_above_six_units_as_the_standard_says() -> None:
    block = np.full((1, 32), 7.0, np.float32)
    assert quantize_rows(block, Dynamic(kind="mx", why=""), GRID)[0, 0] == 6
    assert mx(block[0].astype(float), 1.0, 0, saturate_at=4.0)[0] == 8, "planted: the ceiling rule"


def test_mx_of_zeros_of_extremes_and_of_odd_widths() -> None:
    how = Dynamic(kind="mx", why="")
    assert not quantize_rows(np.zeros((2, 32), np.float32), how, GRID).any()
    for size in (1e-45, 3e38):
        found = quantize_rows(np.full((1, 32), size, np.float32), how, GRID)
        assert np.isfinite(found).all() and (np.abs(found) <= np.float32(3e38)).all()
    with pytest.raises(ValueError, match="48 channels in blocks of 32"):
        quantize_rows(np.zeros((2, 48), np.float32), how, GRID)


@pytest.mark.parametrize("kind", ["token", "channel"])
@pytest.mark.parametrize("ratio", [1.0, 0.7])
@pytest.mark.parametrize("shift", [0.0, 3.0, -20.0])  # beyond 6 standard deviations zero is the range's own end
def test_scales_per_token_and_per_channel(kind: Any, ratio: float, shift: float) -> None:
    """Each slice against the static quantizer of its own extremes."""
    rows = np.random.default_rng(0).normal(shift, 3, size=(30, 50)).astype(np.float32)
    rows[3], rows[:, 4] = 0, 0
    found = quantize_rows(rows, Dynamic(kind=kind, ratio=ratio, why=""), GRID)
    for x, ours in zip(rows, found, strict=True) if kind == "token" else zip(rows.T, found.T, strict=True):
        scale, zero = affine(float(x.min()) * ratio, float(x.max()) * ratio, GRID)
        # scales may differ in the last bit: 6e-8 of at most 63 steps
        np.testing.assert_allclose(ours, fake_quantize(x, scale, zero, GRID), rtol=0, atol=1e-5 * scale)


def test_static_range_is_the_static_quantizer() -> None:
    x = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    one = Range(lo=-1, hi=2, scale=3 / 63, zero_point=21, why="")
    np.testing.assert_array_equal(quantize_rows(x, one, GRID), fake_quantize(x, 3 / 63, 21, GRID))


@pytest.mark.parametrize(
    ("kind", "ratio", "offset"),
    [("token", 0.7, 0), ("channel", 0.8, 0), ("mx", 1.0, 0), ("mx", 0.6, 1), ("mx", 0.9, -1)],
)
def test_calibration_assumes_what_the_pass_computes(kind: Any, ratio: float, offset: int) -> None:
    """To the last bit: both are float32 and round half to even. A plan with another ratio differs."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(50, 64)) * np.exp(rng.normal(size=(50, 64)) * 2)).astype(np.float32)
    x[3], x[5], x[6] = 0, 7, 4  # an empty row, one beyond 6 units, a power of two

    def computed(how: Dynamic) -> Array:
        nodes = [cases.node("Identity", ["x"], "value"), cases.node("Identity", ["value"], "y")]
        made = onnx.helper.make_graph(nodes, "g", [cases.value("x", x.shape)], [cases.value("y", x.shape)])
        proto = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
        graph = Graph.from_proto(onnx.shape_inference.infer_shapes(proto), source="test")
        (reader,) = (n for n in graph.nodes if n.outputs[0].name == "y")
        layer = LayerPlan(
            name="layer", value="value", rows=50, shape=(64, 4), activation_bits=6, dynamic=(how,),
            weight=WeightPlan(dtype="int8", qmax=127, scale=(1.0,) * 4, why=""),
        )  # fmt: skip
        reader.inputs[0] = dynamic_quantize._quantized(graph, reader.inputs[0], how, layer)
        return np.asarray(ort.session(graph).run(["y"], {"x": x})[0])

    how = Dynamic(kind=kind, ratio=ratio, offset=offset, why="")
    np.testing.assert_array_equal(quantize_rows(x, how, GRID), computed(how))
    assert (quantize_rows(x, how, GRID) != computed(Dynamic(kind=kind, ratio=ratio / 2, offset=offset, why=""))).any()
