"""Rotary embedding of interleaved channel pairs without taking the pairs apart.

Legend: x[…, D]; pairs = Reshape(x, […, D/2, 2]), a, b = pairs[…, 0], pairs[…, 1]; swap(x) = Gather(x, [1, 0, 3, 2, …]):
every pair the other way round. cos, sin, c, s and R are constants.

    x·cos + Reshape(Concat(-b, a))·sin                         ->  x·cos + swap(x)·(∓sin)        minus at even channels
    Reshape(Concat(a·c - b·s, a·s' + b·c'))                    ->  x·[c, c', …] + swap(x)·[-s, s', …]
    Reshape(ReduceSum(R[…, 2, 2]·pairs[…, 1, 2], last axis))   ->  x·[R00, R11, …] + swap(x)·[R01, R10, …]

as multiplication by complex numbers, by tables or by matrices is traced. Exact: the same products and sums, a sign
moved into a constant. Pairs taken apart have rank 5 or 6 and rows of one element: NPUs refuse the one, CPUs copy the
other one by one; onnxruntime has a kernel for the form on the right. What `rotary` has turned to halves is left.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.graphs.match import constant_operand, integers, made_by, readers, reduced_axes

NAME = "rotary_pairs"
AFTER = ("fold_constants", "no_ops", "rotary")
_SIGNS = np.array([-1.0, 1.0], np.float32)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op != "Reshape" or not node.outputs[0].outputs:
            continue
        before = made_by(node.inputs[0], "Concat", "ReduceSum")
        if before is None or len(before.outputs[0].outputs) != 1 or not _joins_pairs(before, node):
            continue
        found = _matrices(before) if before.op == "ReduceSum" else _swapped(before, node) or _products(before)
        if isinstance(found, str):
            report.skip(node.name, found)
        elif found is not None:
            _rewrite(graph, node, *found)
            report.did(node.name)
    graph.cleanup()
    return report


def _joins_pairs(before: Node, join: Node) -> bool:
    """Whether […, D/2, 2] becomes […, D]."""
    pairs, whole = before.outputs[0].shape, join.outputs[0].shape
    return bool(len(before.inputs) == 2 and pairs[-1] == 2 and whole[-1] == 2 * pairs[-2])


def _pick(value: Value) -> tuple[Value, int] | None:
    """(x, 0 or 1) where `value` is that element of each pair of x, with or without an axis of one behind."""
    dropped = made_by(value, "Squeeze")
    cut = made_by(dropped.inputs[0] if dropped else value, "Slice", "Gather")
    split = made_by(cut.inputs[0], "Reshape") if cut else None
    if cut is None or split is None or split.outputs[0].shape[-1] != 2:
        return None
    index, rank = integers(cut.inputs[1]), len(split.outputs[0].shape)
    axes = integers(cut.inputs[3]) if cut.op == "Slice" and len(cut.inputs) > 3 else [cut.attrs.get("axis", 0)]
    if index not in ([0], [1]) or axes not in ([-1], [rank - 1]) or split.inputs[0].shape[-1] % 2:
        return None
    return split.inputs[0], index[0]


def _inner(value: Value) -> Value:
    added = made_by(value, "Unsqueeze")
    return value if added is None else added.inputs[0]


def _swapped(joined: Node, join: Node) -> tuple[Value, Array, Array] | str | None:
    """(x, ones, signs) where -b and a are joined."""
    minus, plus = made_by(_inner(joined.inputs[0]), "Neg"), _pick(_inner(joined.inputs[1]))
    first = _pick(minus.inputs[0]) if minus else None
    if first is None or plus is None or first[0] is not plus[0] or (first[1], plus[1]) != (1, 0):
        return None
    users = readers(join.outputs[0])
    if not all(u.op == "Mul" and constant_operand(u) is not None for u in users):
        return "the swapped pairs are not only multiplied by constants"
    return plus[0], np.zeros(0), _SIGNS


def _products(joined: Node) -> tuple[Value, Array, Array] | None:
    """(x, factors of x, factors of swap(x)) where a·c - b·s and a·s' + b·c' are joined."""
    sums = made_by(_inner(joined.inputs[0]), "Sub"), made_by(_inner(joined.inputs[1]), "Add")
    terms = [term for one in sums if one for operand in one.inputs if (term := _term(operand)) is not None]
    if len(terms) != 4:
        return None
    (x, i, c), (x1, j, s), (x2, k, s1), (x3, m, c1) = terms
    if (k, m) == (1, 0):
        (x2, k, s1), (x3, m, c1) = (x3, m, c1), (x2, k, s1)
    if any(one is not x for one in (x1, x2, x3)) or (i, j, k, m) != (0, 1, 0, 1):
        return None
    behind = made_by(joined.inputs[0], "Unsqueeze") is None  # the tables have the axis of one behind themselves
    return x, _pairs(c, c1, behind), _pairs(-s, s1, behind)


def _term(value: Value) -> tuple[Value, int, Array] | None:
    """(x, which, table) of pick(x)·table."""
    product = made_by(value, "Mul")
    operand = constant_operand(product) if product else None
    picked = _pick(operand[0]) if operand else None
    return None if operand is None or picked is None else (*picked, np.asarray(operand[1].values))


def _pairs(even: Array, odd: Array, behind: bool) -> Array:
    """[…, D] of […, D/2] each, which have an axis of one behind, or not."""
    parts = [table[..., 0] if behind else table for table in np.broadcast_arrays(even, odd)]
    stacked = np.stack(parts, axis=-1)
    return stacked.reshape(*stacked.shape[:-2], -1)


def _matrices(total: Node) -> tuple[Value, Array, Array] | None:
    """(x, factors of x, factors of swap(x)) where every pair is multiplied by a matrix."""
    product = made_by(total.inputs[0], "Mul")
    operand = constant_operand(product) if product and reduced_axes(total) == [-1] else None
    split = made_by(operand[0], "Reshape") if operand and total.attrs.get("keepdims", 1) == 0 else None
    if operand is None or split is None or list(split.outputs[0].shape[-2:]) != [1, 2]:
        return None
    r = np.asarray(operand[1].values)
    if r.shape[-2:] != (2, 2) or split.inputs[0].shape[-1] != 2 * total.outputs[0].shape[-2]:
        return None
    x = split.inputs[0]
    return x, _pairs(r[..., 0, 0], r[..., 1, 1], False), _pairs(r[..., 0, 1], r[..., 1, 0], False)


def _rewrite(graph: Graph, join: Node, x: Value, own: Array, others: Array) -> None:
    old, path = join.outputs[0], join.name.rpartition("/")[0]
    shape, dtype = list(old.shape), old.dtype

    def fresh(name: str) -> str:
        return graph.fresh(f"{path}/{name}".lstrip("/"))

    if list(x.shape) != shape:
        target = graph.constant(fresh("Heads.shape"), np.array(shape, np.int64))
        x = graph.add_node("Reshape", [x, target], fresh("Heads"), dtype=dtype, shape=shape)
    order = graph.constant(fresh("Swapped.pairs"), np.arange(shape[-1]).reshape(-1, 2)[:, ::-1].reshape(-1).copy())
    swapped = graph.add_node("Gather", [x, order], fresh("Swapped"), dtype=dtype, shape=shape, attrs={"axis": -1})
    if not own.size:  # the sum is there: signs go into the tables of the products
        for user in readers(old):
            index = next(i for i, t in enumerate(user.inputs) if is_constant(t))
            signed = user.inputs[index].values * np.tile(others, shape[-1] // 2)
            user.inputs[index] = graph.constant(fresh("Swapped.sin"), signed.astype(dtype))
            user.inputs[1 - index] = swapped
        return
    terms = []
    for value, table, name in ((x, own, "Own"), (swapped, others, "Other")):
        constant = graph.constant(fresh(f"{name}.table"), np.ascontiguousarray(table.astype(dtype)))
        terms.append(graph.add_node("Mul", [value, constant], fresh(name), dtype=dtype, shape=shape))
    graph.replace_uses(old, graph.add_node("Add", terms, fresh("Turned"), dtype=dtype, shape=shape))
