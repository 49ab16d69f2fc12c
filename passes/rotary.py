"""Rotary embedding on halves instead of interleaved pairs.

Legend: B batch, S tokens, H heads, D channels a head, C = H·D; pair i of a head is rotated by the angle of (token, i).

    x = Reshape(norm(to_q(h)), [B, S, H, D/2, 2]);  a, b = x[..., 0], x[..., 1]
    y = Reshape(Concat(Unsqueeze(a·cos − b·sin), Unsqueeze(a·sin + b·cos)), [B, S, H, D])         y is interleaved again

becomes, with the columns of to_q, its bias and its norm's gain reordered once (per head evens first, then odds),

    x = Reshape(norm(to_q'(h)), [B, S, H, D]);  a, b = x[..., :D/2], x[..., D/2:]
    y = Concat(a·cos − b·sin, a·sin + b·cos)

Exact: q and k are reordered alike within each head and QKᵀ sums over that axis; the norm's mean square is a sum over
the channels too. Left alone, with the reason: operands that anything else reads, or that come from no linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Linear, Node, Value, as_linear, is_constant
from vdq_export.graphs.match import constant_operand, integers, is_root_mean_square, made_by, readers, scalar

NAME = "rotary"
AFTER = ("fold_constants", "linear", "no_ops", "scatter", "rms_norm")


@dataclass(frozen=True)
class _Rope:
    split: Node  # Reshape to [B, S, H, D/2, 2]
    picks: tuple[Node, Node]  # the Squeezes that give a and b
    join: Node  # Reshape back to [B, S, H, D]
    rotated: tuple[Value, Value]
    linear: Linear
    gain: Node | None


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for product in graph.attention_matmuls():
        joins = [_join(operand) for operand in product.inputs]
        if joins[0] is None or joins[1] is None:
            continue
        found = [_match(join) for join in joins if join is not None]
        reasons = [f for f in found if isinstance(f, str)]
        ropes = [f for f in found if isinstance(f, _Rope)]
        if not reasons and ropes[0].split.outputs[0].shape[-3:] != ropes[1].split.outputs[0].shape[-3:]:
            reasons = ["q and k have different heads"]
        if reasons:
            report.skip(product.name, reasons[0])
            continue
        for rope in ropes:
            _reorder_channels(graph, rope)
            _use_halves(graph, rope)
            report.did(rope.join.name)
    graph.cleanup()
    return report


def _join(value: Value) -> Node | None:
    """The interleaving Reshape(Concat) that `value` is up to scaling and layout, nothing else reading it on the way."""
    while (node := made_by(value, "Transpose", "Reshape", "Mul")) is not None and len(value.outputs) == 1:
        if node.op == "Reshape" and (concat := made_by(node.inputs[0], "Concat")) is not None:
            pairs = concat.outputs[0].shape
            return node if pairs[-1] == 2 and node.outputs[0].shape[-1] == 2 * pairs[-2] else None
        if node.op == "Mul" and scalar(node.inputs[1]) is None:
            return None
        value = node.inputs[0]
    return None


def _match(join: Node) -> _Rope | str:
    parts = [made_by(t, "Unsqueeze") for t in join.inputs[0].inputs[0].inputs]
    rotated = [p.inputs[0] for p in parts if p is not None]
    picks: dict[int, Node] = {}
    splits: dict[int, Node] = {}
    for sum_of in [made_by(t, "Add", "Sub") for t in rotated]:
        for term in sum_of.inputs if sum_of else ():
            product = made_by(term, "Mul")
            operand = constant_operand(product) if product else None
            squeeze = made_by(operand[0], "Squeeze") if operand else None
            cut = made_by(squeeze.inputs[0], "Slice") if squeeze else None
            split = made_by(cut.inputs[0], "Reshape") if cut else None
            index = integers(cut.inputs[1]) if cut else None
            if squeeze is None or split is None or index not in ([0], [1]) or split.outputs[0].shape[-1] != 2:
                return "not the rotation of channel pairs by constant angles"
            picks[index[0]], splits[id(split)] = squeeze, split
    if len(picks) != 2 or len(splits) != 1 or len(rotated) != 2:
        return "not the rotation of the two elements of one pair"
    (split,) = splits.values()
    if len(readers(split.outputs[0])) != 2 or any(len(readers(p.inputs[0])) != 1 for p in picks.values()):
        return "the channel pairs have other readers"
    before = _linear_before(split.inputs[0])
    if isinstance(before, str):
        return before
    return _Rope(split, (picks[0], picks[1]), join, (rotated[0], rotated[1]), *before)


def _linear_before(value: Value) -> tuple[Linear, Node | None] | str:
    """(the linear behind `value`, the Mul with the gain of the RMS norm between them if there is one)."""
    gain, division = None, made_by(value, "Div")
    if (gained := made_by(value, "Mul")) is not None:
        fixed = constant_operand(gained)
        of_channels = fixed is not None and list(fixed[1].shape) == [value.shape[-1]]
        gain, division = gained, made_by(fixed[0], "Div") if fixed and of_channels else None
    norm = [value, *(gain.inputs[:1] if gain else [])]
    if any(len(readers(t)) != 1 for t in norm) or (gain is not None and division is None):
        return f"{value.name} has other readers or is no norm of a linear"
    source = division.inputs[0] if division is not None else value
    expected = 2 if division is not None else 1  # the square in the norm, and the division
    makers = made_by(source, "Add", "MatMul")
    product = makers if makers is None or makers.op == "MatMul" else made_by(makers.inputs[0], "MatMul")
    linear = as_linear(product) if product is not None else None
    if linear is None or linear.output is not source or len(readers(source)) != expected:
        return f"{source.name} is not the output of a linear that only this reads"
    if division is not None and not is_root_mean_square(division.inputs[1].inputs[0], source):
        return f"{division.name} is no norm over all channels"
    return linear, gain


def _reorder_channels(graph: Graph, rope: _Rope) -> None:
    """Evens before odds within each head, in everything that has the linear's output channels."""
    order = np.arange(rope.linear.shape[1]).reshape(rope.split.outputs[0].shape[-3:]).transpose(0, 2, 1).reshape(-1)
    for node in [n for n in (rope.linear.matmul, rope.linear.add, rope.gain) if n is not None]:
        index, old = next((i, t) for i, t in enumerate(node.inputs) if is_constant(t))
        node.inputs[index] = graph.derived(graph.fresh(f"{old.name}.halves"), old, lambda v: np.take(v.T, order, 0).T)


def _use_halves(graph: Graph, rope: _Rope) -> None:
    *lead, heads, half, _ = rope.split.outputs[0].shape
    path = rope.join.name.rsplit("/", 1)[0]

    def whole(name: str, entries: list[int]) -> Value:
        return graph.constant(graph.fresh(f"{path}/{name}"), np.array(entries, np.int64))

    shape, dtype = [*lead, heads, 2 * half], rope.split.outputs[0].dtype
    name, target = graph.fresh(f"{path}/Heads"), whole("heads", shape)
    x = graph.add_node("Reshape", [rope.split.inputs[0], target], name, dtype=dtype, shape=shape)
    axis = whole("half.axis", [len(shape) - 1])
    for index, pick in enumerate(rope.picks):
        bounds = [whole("half.start", [index * half]), whole("half.end", [(index + 1) * half]), axis]
        name = graph.fresh(f"{path}/Half")
        part = graph.add_node("Slice", [x, *bounds], name, dtype=dtype, shape=[*lead, heads, half])
        graph.replace_uses(pick.outputs[0], part)
    name = graph.fresh(f"{path}/Rotated")
    y = graph.add_node("Concat", list(rope.rotated), name, dtype=dtype, shape=shape, attrs={"axis": -1})
    graph.replace_uses(rope.join.outputs[0], y)
