"""Strided assignment without ScatterND.

Legend: D channels, "…" the other axes. `out[..., 0::2] = a; out[..., 1::2] = b` on an empty tensor is traced as

    ScatterND(ScatterND(empty[D, …], evens, Transpose(a, t)), odds, Transpose(b, t))       a, b: […, D/2]

and becomes

    Transpose(Reshape(Concat(Unsqueeze(a, -1), Unsqueeze(b, -1), axis=-1), […, D]), t)

and Transpose(Transpose(x, t), p) behind it one Transpose, or none where they cancel.

Exact: every element of the empty tensor is overwritten, so only where it goes is expressed differently. SoC compilers
refuse ScatterND; on a CPU it moves elements one index at a time.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, Variable
from vdq_export.match import integers, made_by, readers

NAME = "scatter"
AFTER = ("fold_constants", "no_ops")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        behind = node.outputs[0].outputs if node.op == "ScatterND" else []
        if node.op != "ScatterND" or any(r.op == "ScatterND" and r.inputs[0] is node.outputs[0] for r in behind):
            continue
        halves = _halves(node)
        if isinstance(halves, str):
            report.skip(node.name, halves)
            continue
        _interleave(graph, node, *halves)
        report.did(node.name)
    graph.cleanup()
    return report


def _halves(odd: Node) -> tuple[Value, Value, list[int]] | str:
    """(a, b, the permutation t both went through), or why this is not the assignment of the two halves."""
    even = made_by(odd.inputs[0], "ScatterND")
    if even is None or len(even.outputs[0].outputs) != 1 or odd.attrs.get("reduction", "none") != "none":
        return "not a pair of assignments"
    width = even.inputs[0].shape[0]
    if (integers(even.inputs[1]), integers(odd.inputs[1])) != (list(range(0, width, 2)), list(range(1, width, 2))):
        return "the assignments do not fill even and odd indices"
    first, second = made_by(even.inputs[2], "Transpose"), made_by(odd.inputs[2], "Transpose")
    if first is None or second is None or first.attrs["perm"] != second.attrs["perm"]:
        return "the two halves lie in different layouts"
    perm = list(first.attrs["perm"])
    if perm[0] != len(perm) - 1:
        return "the strided axis is not the last"
    return first.inputs[0], second.inputs[0], perm


def _interleave(graph: Graph, odd: Node, a: Value, b: Value, perm: list[int]) -> None:
    path = odd.name.rsplit("/", 1)[0]
    last = graph.constant(graph.fresh(f"{path}/Unsqueeze.1"), np.array([-1], np.int64))
    parts: list[Variable] = [
        graph.add_node("Unsqueeze", [t, last], graph.fresh(f"{path}/Unsqueeze"), dtype=a.dtype, shape=[*a.shape, 1])
        for t in (a, b)
    ]
    both = graph.add_node(
        "Concat", parts, graph.fresh(f"{path}/Concat"), dtype=a.dtype, shape=[*a.shape, 2], attrs={"axis": -1}
    )
    shape = [*a.shape[:-1], 2 * a.shape[-1]]
    target = graph.constant(graph.fresh(f"{path}/Reshape.1"), np.array(shape, np.int64))
    flat = graph.add_node("Reshape", [both, target], graph.fresh(f"{path}/Reshape"), dtype=a.dtype, shape=shape)
    old = odd.outputs[0]
    for reader in readers(old):
        if reader.op != "Transpose":
            continue
        order = [perm[i] for i in reader.attrs["perm"]]
        if order == list(range(len(order))):
            graph.replace_uses(reader.outputs[0], flat)
            reader.outputs.clear()
        else:
            reader.inputs[0], reader.attrs["perm"] = flat, order
    if old.outputs or any(old is o for o in graph.gs.outputs):
        name, turned_shape = graph.fresh(f"{path}/Transpose"), [shape[i] for i in perm]
        turned = graph.add_node("Transpose", [flat], name, dtype=a.dtype, shape=turned_shape, attrs={"perm": perm})
        graph.replace_uses(old, turned)
    odd.outputs.clear()
