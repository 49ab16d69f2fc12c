"""rank_limit: any chain of layout changes becomes low-rank steps that move every element to the same place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tests.graphs import OPSET
from vdq_export import ort, pipeline
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph
from vdq_export.passes._axes import Layout, steps

Chain = Sequence[tuple[str, Sequence[int] | str]]


def graph_of(shape: Sequence[int], chain: Chain) -> Graph:
    """x[shape] through ("Reshape", shape), ("Transpose", perm), ("Einsum", equation) …, scaled by one at both ends."""
    nodes = [helper.make_node("Mul", ["x", "one"], ["first"], name="first")]
    constants = [numpy_helper.from_array(np.float32(1), "one")]
    for index, (op, what) in enumerate(chain):
        name, before = f"unpatch/{op}_{index}", nodes[-1].output[0]
        if op == "Reshape":
            constants.append(numpy_helper.from_array(np.array(what, np.int64), f"{name}.1"))
            nodes.append(helper.make_node(op, [before, f"{name}.1"], [name], name=name))
        else:
            attrs = {"perm": what} if op == "Transpose" else {"equation": what}
            nodes.append(helper.make_node(op, [before], [name], name=name, **attrs))
    nodes.append(helper.make_node("Mul", [nodes[-1].output[0], "one"], ["y"], name="last"))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    proto = helper.make_model(
        helper.make_graph(nodes, "layout", ends, outs, constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    made = Graph.from_proto(shape_inference.infer_shapes(proto, data_prop=True))
    made.cleanup()
    return made


def limited(graph: Graph) -> tuple[Graph, PassReport]:
    made = graph.copy()
    (report,) = pipeline.run_passes(made, ["rank_limit"], PassContext())
    return made, report


def ranks(graph: Graph) -> list[int]:
    return [len(value.shape) for node in graph.nodes for value in node.outputs]


def data(shape: Sequence[int]) -> dict[str, Array]:
    return {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}


# The unpatchify of Wan (patches of 1x2x2), of Latte (an Einsum, the frames as batch), and six axes that all move apart.
WAN: Chain = [
    ("Reshape", (1, 3, 4, 5, 1, 2, 2, 7)),
    ("Transpose", (0, 7, 1, 4, 2, 5, 3, 6)),
    ("Reshape", (1, 7, 3, 8, 10)),
]
LATTE: Chain = [("Reshape", (2, 4, 5, 2, 2, 3)), ("Einsum", "nhwpqc->nchpwq"), ("Reshape", (2, 3, 8, 10))]
APART: Chain = [("Reshape", (2, 3, 4, 5, 2, 3)), ("Transpose", (5, 3, 1, 4, 2, 0)), ("Reshape", (15, 6, 8))]


@pytest.mark.parametrize(
    ("shape", "chain", "transposes"), [((1, 60, 28), WAN, 1), ((2, 20, 12), LATTE, 2), ((2, 60, 6), APART, 2)]
)
def test_unpatchify_fits_into_rank_five(shape: Sequence[int], chain: Chain, transposes: int) -> None:
    graph = graph_of(shape, chain)
    made, report = limited(graph)
    assert max(ranks(graph)) > 5 >= max(ranks(made))
    assert [node.op for node in made.nodes].count("Transpose") == transposes
    assert not report.skipped
    assert np.array_equal(ort.run(graph, data(shape))["y"], ort.run(made, data(shape))["y"])


def test_einsum_that_moves_axes_is_a_transpose_at_any_rank() -> None:
    graph = graph_of((2, 3, 4), [("Einsum", "abc -> cab")])
    made, _ = limited(graph)
    assert [node.op for node in made.nodes] == ["Mul", "Transpose", "Mul"]
    assert np.array_equal(ort.run(graph, data((2, 3, 4)))["y"], ort.run(made, data((2, 3, 4)))["y"])


@pytest.mark.parametrize("equation", ["aab->ab", "abc->ab"])
def test_einsum_that_computes_is_left(equation: str) -> None:
    shape = (3, 3, 4)
    made, report = limited(graph_of(shape, [("Einsum", equation)]))
    assert report.applied == 0
    assert [node.op for node in made.nodes] == ["Mul", "Einsum", "Mul"]


def test_arithmetic_at_a_high_rank_is_left_and_said() -> None:
    graph = graph_of((2, 64), [("Reshape", (2, 2, 2, 2, 2, 4))])
    _, report = limited(graph)
    assert report.applied == 0
    assert [(skip.where, skip.why) for skip in report.skipped] == [
        ("unpatch/Reshape_0", "Reshape of rank 6: not between layout changes"),
        ("last", "Mul of rank 6: not between layout changes"),
    ]


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    """A shape, and layout changes that fit it: Reshapes also cut axes that no earlier one had."""

    def factors(count: int) -> list[int]:
        found = []
        while count > 1:
            found.append(draw(st.sampled_from([d for d in range(2, count + 1) if count % d == 0])))
            count //= found[-1]
        return draw(st.permutations([*found, *[1] * draw(st.integers(0, 2))]))

    size = draw(st.sampled_from([1, 6, 60, 96, 128, 144, 256]))
    shape = factors(size) or [1]
    changes: list[tuple[str, list[int]]] = []
    rank = len(shape)
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            changes.append(("Transpose", draw(st.permutations(range(rank)))))
        else:
            changes.append(("Reshape", factors(size) or [1]))
            rank = len(changes[-1][1])
    return shape, changes


@settings(max_examples=300)
@given(chains())
def test_any_chain_is_low_rank_moves(case: tuple[list[int], list[tuple[str, list[int]]]]) -> None:
    shape, changes = case
    expected = actual = np.arange(np.prod(shape)).reshape(shape)
    layout = Layout(shape)
    for op, what in changes:
        expected = expected.transpose(what) if op == "Transpose" else expected.reshape(what)
        if op == "Transpose":
            layout.transpose(what)
        else:
            layout.reshape(what)
    for move in layout.done():
        for sizes, order in steps(move, 3):  # three, as more moves then need several steps
            assert len(sizes) <= 3
            actual = actual.reshape(sizes).transpose(order)
    assert np.array_equal(actual.reshape(expected.shape), expected)
