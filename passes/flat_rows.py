"""Linears and layer norms over at most four dimensions.

Legend: x[A, B, C, D, K] of rank 5 (or more), R = A·B·C·D rows; W[K, N], b[N], g[K].

    Add(MatMul(x, W), b)             ->  Reshape(Add(MatMul(Reshape(x, [1, R, K]), W), b), [A, B, C, D, N])
    LayerNormalization(x, g)         ->  Reshape(LayerNormalization(Reshape(x, [1, R, K]), g), [A, B, C, D, K])

Exact: both work on each row of K channels alone, and a Reshape moves nothing. Hexagon's compiler takes MatMul and
LayerNormalization up to rank 4 and leaves what is above to the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value

NAME = "flat_rows"
AFTER = ("linear", "no_ops")
LIMIT = 4


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for linear in graph.linears():
        if len(linear.value.shape) > LIMIT:
            chain = [linear.matmul] if linear.add is None else [linear.matmul, linear.add]
            _flatten(graph, chain)
            report.did(linear.name)
    for node in graph.nodes:
        if node.op != "LayerNormalization" or len(node.inputs[0].shape or ()) <= LIMIT:
            continue
        rank = len(node.inputs[0].shape)
        if node.attrs.get("axis", -1) not in (-1, rank - 1) or len(node.outputs) > 1:
            report.skip(node.name, "it normalizes over more than the last axis, or has more than one output")
            continue
        node.attrs["axis"] = -1
        _flatten(graph, [node])
        report.did(node.name)
    graph.cleanup()
    return report


def _flatten(graph: Graph, chain: Sequence[Node]) -> None:
    """Let the first of `chain` read rows, and what reads the last see the old shape."""
    value, output = chain[0].inputs[0], chain[-1].outputs[0]
    path, shape = chain[-1].name.rpartition("/")[0], list(output.shape)
    rows = prod(shape[:-1])
    readers = list(output.outputs)
    chain[0].inputs[0] = _reshape(graph, value, [1, rows, int(value.shape[-1])], path)
    for node in chain:
        node.outputs[0].shape = [1, rows, shape[-1]]
    restored = _reshape(graph, output, shape, path)
    mine = [node for node in output.outputs if not any(node is reader for reader in readers)]
    graph.replace_uses(output, restored, keep=mine)


def _reshape(graph: Graph, value: Value, shape: list[int], path: str) -> Value:
    name = graph.fresh(f"{path}/Reshape.rows".lstrip("/"))
    target = graph.constant(graph.fresh(f"{name}.1"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], name, dtype=np.float32, shape=shape)
