"""Graphs of a few nodes for the fusing rewrites, and what every fused one is held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests import cuda_reference
from tests.graphs import Builder
from vdq_export import ort
from vdq_export.contract import PassReport
from vdq_export.graph import Array, Graph, Node
from vdq_export.metrics import sqnr_db
from vdq_export.targets.cuda import fuse
from vdq_export.targets.cuda.merge import merge

EXACT = 115.0  # dB; see test_cuda_fuse
B, T, C, H = 2, 6, 32, 2


Shapes = Mapping[str, Sequence[int]]


def built(make: Builder, outputs: Shapes, info: Shapes | None = None) -> Graph:
    """The graph of x[B, T, C] and mod[B, 1, C]. info: shapes that onnx does not infer."""

    def described(shapes: Shapes) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in shapes.items()]

    inputs = {"x": (B, T, C), "mod": (B, 1, C)}
    graph = helper.make_graph(
        make.nodes, "g", described(inputs), described(outputs), make.params, value_info=described(info or {})
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model))


def feeds() -> dict[str, Array]:
    random = np.random.default_rng(7)
    return {name: random.normal(size=s).astype(np.float32) for name, s in (("x", (B, T, C)), ("mod", (B, 1, C)))}


def quantized(
    make: Builder, x: str, name: str, scale: float = 0.03, zero: int = 120, kind: str = "uint8", levels: int = 0
) -> str:
    """DequantizeLinear(QuantizeLinear(x)), behind a Clip where there are fewer levels."""
    if levels:
        ends = [np.float32(scale) * np.float32(n - zero) for n in (0, levels - 1)]
        limits = [make.param(f"{name}.{end}", value) for end, value in zip(("low", "high"), ends, strict=True)]
        x = make.op("Clip", x, *limits, name=f"{name}/Clip")
    given = make.param(f"{name}.scale", scale), make.param(f"{name}.zero", zero, kind)
    return make.op(
        "DequantizeLinear", make.op("QuantizeLinear", x, *given, name=f"{name}/Q"), *given, name=f"{name}/DQ"
    )


def linear(make: Builder, x: str, name: str, k: int = C, n: int = C, bias: bool = True, kind: Any = np.int8) -> str:
    codes = make.param(f"{name}.codes", make.random.integers(-100, 100, (k, n)), kind)
    scales = make.param(f"{name}.scales", make.random.uniform(1e-3, 2e-3, n))
    weight = make.op("DequantizeLinear", codes, scales, name=f"{name}/Weight", axis=1)
    y = make.op("MatMul", x, weight, name=f"{name}/MatMul")
    return make.op("Add", y, make.weight(f"{name}.bias", n), name=f"{name}/Add") if bias else y


def fused(graph: Graph, varied: Sequence[str] = ()) -> tuple[Graph, dict[str, PassReport]]:
    """The graph with all rewrites done; it computes what it did, and twice is once. varied: constants of the bins."""
    expected = ort.run(graph, feeds(), exact=True)
    constants = {one.name: np.asarray(one.values) for one in graph.constants() if one.name in varied}
    merged = merge(graph, [constants])
    reports = {report.name: report for report in fuse.run(merged)}
    before = merged.hash()
    assert not any(report.applied for report in fuse.run(merged))
    assert merged.hash() == before
    given = feeds() | ({"bin": np.array([0])} if any(one.name == "bin" for one in merged.gs.inputs) else {})
    got = cuda_reference.run(
        merged.to_proto(), {k: v for k, v in given.items() if k in {i.name for i in merged.gs.inputs}}
    )
    assert got.keys() == expected.keys()
    assert min(sqnr_db(expected[name], got[name]) for name in got) > EXACT
    return merged, reports


def kinds(graph: Graph) -> dict[str, int]:
    """Operators but the bin's numbers."""
    return dict(Counter(node.op for node in graph.nodes if node.op not in ("Row", "Pick")))


def only(graph: Graph, op: str) -> Node:
    (node,) = [node for node in graph.nodes if node.op == op]
    return node


def skips(reports: Mapping[str, PassReport]) -> str:
    return "; ".join(skip.why for report in reports.values() for skip in report.skipped)
