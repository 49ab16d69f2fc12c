"""Isolated graphs on the HTP emulator: quantized as the qnn target quantizes, with and without one canonical form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper, shape_inference

from tests.graphs import OPSET
from vdq_export import ort, pipeline, recipe
from vdq_export.calib.record import Slot
from vdq_export.calib.values import Extremes, float_values, plan_values
from vdq_export.contract import PassContext
from vdq_export.graph import Array, Graph
from vdq_export.metrics import sqnr_db
from vdq_export.plan import Bin, QuantPlan
from vdq_export.targets import qnn

NodeSpec = tuple[str, Sequence[str], str, Mapping[str, Any]]  # op, inputs, output (also the node's name), attributes


class Decibels(NamedTuple):
    """SQNR of the output against the float graph, of onnxruntime's CPU and of the emulator, on the same QDQ graph."""

    cpu: float
    htp: float


def graph(shapes: Mapping[str, Sequence[int]], nodes: Sequence[NodeSpec], **constants: Any) -> Graph:
    """float32 inputs of `shapes`; the last node's output is the graph's."""
    made = helper.make_graph(
        [helper.make_node(op, list(inputs), [out], name=out, **attrs) for op, inputs, out, attrs in nodes],
        "isolated",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(nodes[-1][2], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    proto = shape_inference.infer_shapes(proto, data_prop=True)
    onnx.checker.check_model(proto)
    return Graph.from_proto(proto)


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(float_graph: Graph, feeds: Mapping[str, Array]) -> Graph:
    """A copy with every value in 16 bits, ranges as `feeds` give them, as targets/qnn would write it."""
    one = Bin(index=0, t=(0.0, 1000.0), steps=(0.0,))
    empty = QuantPlan(
        model="isolated", graph_hash="", target="qnn", recipe=_recipe(), bins=(one,), layers=(), bins_why="one"
    )
    names = [value.name for value in float_values(float_graph)]
    found = {**feeds, **ort.run(float_graph, feeds, [n for n in names if n not in feeds])}
    slot = Slot(0.0, "cond")
    extremes = Extremes({n: {slot: (float(found[n].min()), float(found[n].max()))} for n in names}, (slot,))
    plan = plan_values(empty, float_graph, extremes, qnn.spec())
    made = float_graph.copy()
    pipeline.run_passes(made, ["qdq_values"], PassContext(plan, one, qnn.spec()))
    return made


def decibels(float_graph: Graph, feeds: Mapping[str, Array], arch: str = "v75") -> Decibels:
    """Quantize, compile strictly, emulate. Raises CompileError where the compiler refuses."""
    from vdq_export.targets.qnn import hexagon  # needs onnxruntime-qnn

    made = quantized(float_graph, feeds)
    (expected,) = ort.run(float_graph, feeds).values()
    (cpu,) = ort.run(made, feeds, exact=True).values()
    (htp,) = hexagon.emulator(made.to_proto().SerializeToString(), arch).run(None, dict(feeds))
    return Decibels(sqnr_db(expected, cpu), sqnr_db(expected, htp))


def with_form(float_graph: Graph, *names: str) -> Graph:
    made = float_graph.copy()
    pipeline.run_passes(made, names, PassContext(spec=qnn.spec()))
    return made


def _recipe() -> recipe.Recipe:
    """Sixteen-bit activations: the target's own default."""
    found = recipe.load("static-minmax")
    return replace(found, activations=replace(found.activations, bits=16))
