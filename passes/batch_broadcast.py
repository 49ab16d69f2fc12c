"""No broadcast along the third-last axis in Add and Mul.

Legend: x[…, B, S, C]; c[…, 1, S, C] or c[…, 1, S, 1] with B, S > 1, or of lower rank.

    Add(x, c), Mul(x, c)   c constant     ->  Add(x, c')           c'[…, B, S, C]: c repeated B times, up to LIMIT_BYTES
                           c otherwise    ->  Add(x, Tile(c, [1, B, 1, 1]))
                           c = Expand(z)  ->  Add(x, Tile(z, …))   where the expanded axis is the third-last

Exact: the same numbers are added. Hexagon's compiler tiles the two axes in front of the last together and reads c past
its end: silently wrong (2 dB) in 16 bits before a norm, for S divisible by four from 8 on; some shapes crash it. Only
that axis is repeated, not the others. It costs c's bytes B times where c is constant and small, one copy a run else.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.graphs.match import made_by

NAME = "batch_broadcast"
AFTER = ("fold_constants", "linear", "no_ops", "rank_limit")
AXIS = -3
LIMIT_BYTES = 4 * 2**20


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    made: dict[tuple[str, int], Value] = {}
    for node in graph.nodes:
        if node.op not in ("Add", "Mul"):
            continue
        for index, operand in enumerate(list(node.inputs)):
            count = _repeats(node, operand)
            if count > 1:
                key = (operand.name, count)
                if key not in made:
                    made[key] = _repeated(graph, node, operand, count)
                node.inputs[index] = made[key]
                report.did(f"{node.name}: {operand.name} {tuple(operand.shape)} repeated {count} times")
            elif (expand := made_by(operand, "Expand")) is not None and _use_tile(graph, expand):
                report.did(f"{expand.name}: Tile instead of Expand")
    graph.cleanup()
    return report


def _repeats(node: Node, operand: Value) -> int:
    """How often `operand` is repeated along the axis in question; 1 where that is not the case of the docstring."""
    shape = node.outputs[0].shape
    if shape is None or operand.shape is None or len(shape) < -AXIS or len(operand.shape) < 2:
        return 1
    own = [1] * (len(shape) - len(operand.shape)) + list(operand.shape)
    return int(shape[AXIS]) if own[AXIS] == 1 and own[AXIS + 1] > 1 else 1


def _repeated(graph: Graph, node: Node, operand: Value, count: int) -> Value:
    shape = [1] * (-AXIS - len(operand.shape)) + list(operand.shape)
    shape[AXIS] = count
    if is_constant(operand) and operand.values.nbytes * count <= LIMIT_BYTES:
        values = np.ascontiguousarray(np.broadcast_to(operand.values, shape))
        return graph.constant(graph.fresh(f"{operand.name}.repeated"), values)
    path = node.name.rpartition("/")[0]
    value = operand
    if len(operand.shape) < len(shape):
        before = graph.constant(graph.fresh(f"{operand.name}/Reshape.1"), np.array([1, *operand.shape], np.int64))
        name = graph.fresh(f"{path}/Reshape".lstrip("/"))
        value = graph.add_node("Reshape", [operand, before], name, dtype=operand.dtype, shape=[1, *operand.shape])
    name = graph.fresh(f"{path}/Tile".lstrip("/"))
    times = [count if axis == len(shape) + AXIS else 1 for axis in range(len(shape))]
    repeats = graph.constant(graph.fresh(f"{name}.1"), np.array(times, np.int64))
    return graph.add_node("Tile", [value, repeats], name, dtype=operand.dtype, shape=shape)


def _use_tile(graph: Graph, expand: Node) -> bool:
    """Let an Expand along the axis in question be a Tile; whether it was one. Same rank before and after."""
    before, after = expand.inputs[0].shape, expand.outputs[0].shape
    if before is None or after is None or len(before) != len(after) or len(after) < -AXIS:
        return False
    if before[AXIS] != 1 or after[AXIS] == 1 or after[AXIS + 1] == 1:
        return False
    times = np.array([n // m for n, m in zip(after, before, strict=True)], np.int64)
    expand.op, expand.attrs = "Tile", {}
    expand.inputs[1] = graph.constant(graph.fresh(f"{expand.name}.repeats"), times)
    return True
