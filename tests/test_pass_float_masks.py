"""float_masks: the same choices without a boolean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tests.graphs import OPSET
from tests.hexagon_cases import NodeSpec, decibels, noise, with_form
from vdq_export import ort
from vdq_export.contract import PassContext
from vdq_export.devices.qnn_provider import available
from vdq_export.errors import CompileError
from vdq_export.graph import Array, Graph
from vdq_export.passes import float_masks

TOKENS, TEXT = 12, 8
BOOL, INT64, FLOAT = TensorProto.BOOL, TensorProto.INT64, TensorProto.FLOAT
BIAS: NodeSpec = ("Where", ["m", "zero", "low"], "bias", {})
LAST: Sequence[NodeSpec] = [BIAS, ("Add", ["s", "bias"], "scores", {}), ("Softmax", ["scores"], "y", {"axis": -1})]


def masked(nodes: Sequence[NodeSpec], scores: Sequence[int], **constants: object) -> Graph:
    """Softmax(s[scores] + Where(m, 0, -64)), m made by `nodes` from mask, int64 [1, TEXT]."""
    arrays = {"zero": np.float32(0), "low": np.float32(-64), **constants}
    made = helper.make_graph(
        [helper.make_node(op, list(i), [out], name=out, **attrs) for op, i, out, attrs in [*nodes, *LAST]],
        "masked",
        [helper.make_tensor_value_info("s", FLOAT, scores), helper.make_tensor_value_info("mask", INT64, [1, TEXT])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    proto = shape_inference.infer_shapes(proto, data_prop=True)
    onnx.checker.check_model(proto)
    return Graph.from_proto(proto)


def refiner() -> Graph:
    """HunyuanVideo's: query and key are both prompt tokens, and everybody may look at the first."""
    axes, first = np.array([1]), np.zeros((1, TEXT, 1), np.int64)
    nodes: list[NodeSpec] = [
        ("Cast", ["mask"], "keys", {"to": BOOL}),
        ("Unsqueeze", ["keys", "axes"], "row", {}),
        ("Tile", ["row", "times"], "square", {}),
        ("Transpose", ["square"], "turned", {"perm": [0, 2, 1]}),
        ("And", ["square", "turned"], "both", {}),
        ("ScatterElements", ["both", "first", "true"], "m", {"axis": 2}),
    ]
    return masked(nodes, (1, TEXT, TEXT), axes=axes, times=np.array([1, TEXT, 1]), first=first,
                  true=np.ones((1, TEXT, 1), bool))  # fmt: skip


def counted(op: str) -> Graph:
    """HunyuanVideo's: the video, then as many prompt tokens as the mask counts."""
    places = np.arange(TOKENS + TEXT)[None]
    nodes: list[NodeSpec] = [
        ("Cast", ["mask"], "small", {"to": TensorProto.INT32}),
        ("ReduceSum", ["small", "axes"], "count", {"keepdims": 1}),
        ("Cast", ["count"], "count64", {"to": INT64}),
        ("Add", ["count64", "tokens"], "end", {}),
        (op, ["places", "end"] if op.startswith("G") else ["end", "places"], "beyond", {}),
        ("Not", ["beyond"], "inside", {}),
        ("Or", ["inside", "never"], "m", {}),
    ]
    return masked(nodes, (1, TEXT, TOKENS + TEXT), axes=np.array([1]), tokens=np.array(TOKENS), places=places,
                  never=np.zeros_like(places, bool))  # fmt: skip


def padded() -> Graph:
    """HunyuanVideo 1.5's: every video token counts, before the prompt's; two that never do are behind."""
    nodes: list[NodeSpec] = [
        ("Cast", ["mask"], "keys", {"to": BOOL}),
        ("Pad", ["keys", "before", "true"], "all", {}),
        ("Pad", ["all", "behind"], "m", {}),
    ]
    return masked(nodes, (1, TEXT, TOKENS + TEXT + 2), before=np.array([0, TOKENS, 0, 0]),
                  behind=np.array([0, 0, 0, 2]), true=np.array(True))  # fmt: skip


def equal() -> Graph:
    """HunyuanVideo 1.5's: a token counts where its number is that of the mask."""
    nodes: list[NodeSpec] = [("Equal", ["mask", "one"], "m", {})]
    return masked(nodes, (1, TEXT, TEXT), one=np.array(1))


CASES = {"refiner": refiner(), "padded": padded(), "equal": equal(), **{op: counted(op) for op in float_masks._MARGIN}}


def feeds(made: Graph, kept: int) -> dict[str, Array]:
    shape = next(value.shape for value in made.gs.inputs if value.name == "s")
    return {"s": 2 * noise(*shape), "mask": (np.arange(TEXT) < kept).astype(np.int64)[None]}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", [0, 3, TEXT])
def test_exact_at_every_length(name: str, kept: int) -> None:
    made = CASES[name]
    floats = with_form(made, "float_masks")
    assert np.array_equal(*(ort.run(one, feeds(made, kept))["y"] for one in (made, floats)))


@pytest.mark.parametrize("name", CASES)
def test_no_boolean_is_left_and_once(name: str) -> None:
    made = CASES[name].copy()
    assert float_masks.run(made, PassContext()).applied == 1
    assert {str(np.dtype(value.dtype)) for node in made.nodes for value in node.outputs} == {"float32"}
    assert float_masks.run(made, PassContext()).applied == 0


def test_what_has_no_form_is_left_and_said() -> None:
    nodes: list[NodeSpec] = [("Cast", ["mask"], "keys", {"to": BOOL}), ("Xor", ["keys", "keys"], "m", {})]
    report = float_masks.run(masked(nodes, (1, TEXT, TEXT)), PassContext())
    assert report.applied == 0
    assert [(skip.where, skip.why) for skip in report.skipped] == [("bias", "Xor m has no form in floats")]


@pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
def test_the_compiler_refuses_without_and_takes_with_it() -> None:
    made = CASES["refiner"]
    with pytest.raises(CompileError, match="ScatterElements"):
        decibels(made, feeds(made, 5))
    assert min(decibels(with_form(made, "float_masks"), feeds(made, 5))) > 55
