"""Assignment to a part of a tensor without ScatterND.

Legend: D channels, "…" the other axes. `out[..., 0::2] = a; out[..., 1::2] = b` on an empty tensor is traced as

    ScatterND(ScatterND(empty[D, …], evens, Transpose(a, t)), odds, Transpose(b, t))       a, b: […, D/2]

and becomes

    Transpose(Reshape(Concat(Unsqueeze(a, -1), Unsqueeze(b, -1), axis=-1), […, D]), t)

and `x[:, i:j] = u`, traced with the assigned axis in front by a permutation t, becomes

    ScatterND(Transpose(x, t), i … j-1, Transpose(u, t))
      ->  Transpose(Concat(x[:, :i], u, x[:, j:], axis=t[0]), t)

and Transpose(Transpose(x, t), p) behind it one Transpose, or none where they cancel.

Exact: every element is one that was assigned or, outside i … j-1, kept; only where it goes is expressed differently.
SoC compilers refuse ScatterND; on a CPU it moves elements one index at a time.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, Variable
from vdq_export.graphs.match import integers, made_by, readers

NAME = "scatter"
AFTER = ("fold_constants", "no_ops")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    while _sweep(graph, report):  # assignments one after the other go from the last to the first
        report.skipped.clear()
    return report


def _sweep(graph: Graph, report: PassReport) -> int:
    """Rewrite what no other assignment reads; how many were."""
    done = 0
    for node in graph.nodes:
        behind = readers(node.outputs[0]) if node.op == "ScatterND" and node.outputs else []
        if not behind or any(r.op == "ScatterND" and r.inputs[0] is node.outputs[0] for r in behind):
            continue
        halves, rows = _halves(node), _rows(node)
        if not isinstance(halves, str):
            _interleave(graph, node, *halves)
        elif rows is not None:
            _splice(graph, node, *rows)
        else:
            report.skip(node.name, halves)
            continue
        report.did(node.name)
        done += 1
    graph.cleanup()
    return done


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
    _hand_on(graph, odd, flat, perm)


def _rows(node: Node) -> tuple[int, int] | None:
    """(i, j) where `node` assigns to rows i … j-1 of its first axis."""
    indices = node.inputs[1]
    found = integers(indices)
    if not found or list(indices.shape) != [len(found), 1] or node.attrs.get("reduction", "none") != "none":
        return None
    first, count = found[0], len(found)
    return (first, first + count) if first >= 0 and found == list(range(first, first + count)) else None


def _splice(graph: Graph, node: Node, first: int, end: int) -> None:
    """Concat of what is kept before, what is assigned, and what is kept behind."""
    data, update, perm = node.inputs[0], node.inputs[2], list(range(len(node.inputs[0].shape)))
    turned = [made_by(data, "Transpose"), made_by(update, "Transpose")]
    if turned[0] is not None and turned[1] is not None and turned[0].attrs["perm"] == turned[1].attrs["perm"]:
        data, update, perm = turned[0].inputs[0], turned[1].inputs[0], list(turned[0].attrs["perm"])
    axis, path = perm[0], node.name.rpartition("/")[0]
    parts = [_kept(graph, data, path, axis, 0, first), update, _kept(graph, data, path, axis, end, data.shape[axis])]
    present = [part for part in parts if part is not None]
    joined = graph.add_node(
        "Concat", present, graph.fresh(f"{path}/Concat".lstrip("/")), dtype=data.dtype, shape=data.shape,
        attrs={"axis": axis},
    )  # fmt: skip
    _hand_on(graph, node, joined, perm)


def _kept(graph: Graph, data: Value, path: str, axis: int, start: int, end: int) -> Value | None:
    """data[start:end] along `axis`, None where that is nothing."""
    if start == end:
        return None
    name = graph.fresh(f"{path}/Slice".lstrip("/"))
    bounds = [graph.constant(graph.fresh(f"{name}.{i + 1}"), np.array([v])) for i, v in enumerate((start, end, axis))]
    shape = [end - start if d == axis else n for d, n in enumerate(data.shape)]
    return graph.add_node("Slice", [data, *bounds], name, dtype=data.dtype, shape=shape)


def _hand_on(graph: Graph, node: Node, made: Variable, perm: list[int]) -> None:
    """Let the readers of `node`, a ScatterND, read Transpose(made, perm), and Transposes among them `made` itself."""
    path, old = node.name.rpartition("/")[0], node.outputs[0]
    for reader in readers(old):
        if reader.op != "Transpose":
            continue
        order = [perm[i] for i in reader.attrs["perm"]]
        if order == list(range(len(order))):
            graph.replace_uses(reader.outputs[0], made)
            reader.outputs.clear()
        else:
            reader.inputs[0], reader.attrs["perm"] = made, order
    if old.outputs or any(old is o for o in graph.gs.outputs):
        name, shape = graph.fresh(f"{path}/Transpose".lstrip("/")), [made.shape[i] for i in perm]
        turned = made
        if perm != sorted(perm):
            turned = graph.add_node("Transpose", [made], name, dtype=made.dtype, shape=shape, attrs={"perm": perm})
        graph.replace_uses(old, turned)
    node.outputs.clear()
