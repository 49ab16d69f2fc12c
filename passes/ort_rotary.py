"""Rotary embedding as one onnxruntime kernel.

Legend: B batch, S tokens, H heads, D channels a head; cos, sin: constants [1, S, 1, D/2]; C, S': each entry twice.

    x[B, S, H, D];  a, b = x[..., :D/2], x[..., D/2:];  Concat(a·cos − b·sin, a·sin + b·cos)
      ->  Reshape(com.microsoft.RotaryEmbedding(Reshape(x, [B, S, H·D]), 0, cos[S, D/2], sin[S, D/2]), [B, S, H, D])
    x·C + Gather(x, [1, 0, 3, 2, …])·S'        (rotary_pairs)
      ->  the same, interleaved; without the Reshapes where x is [B, H, S, D] or [B, S, D] already

Exact. Nine passes over the tokens become one.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, Value
from vdq_export.graphs.match import constant_operand, integers, made_by

NAME = "ort_rotary"
AFTER = ("rotary", "rotary_pairs")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op == "Add" and (terms := _swapped(node)) is not None:
            pairs = _interleaved(*terms)
            if isinstance(pairs, str):
                report.skip(node.name, pairs)
            else:
                _fuse(graph, node, terms[0], *pairs, interleaved=1)
                report.did(node.name)
            continue
        if node.op != "Concat" or len(node.inputs) != 2 or len(node.outputs[0].shape) != 4:
            continue
        minus, plus = made_by(node.inputs[0], "Sub"), made_by(node.inputs[1], "Add")
        if minus is None or plus is None:
            continue
        found = _match(minus, plus)
        if isinstance(found, str):
            report.skip(node.name, found)
            continue
        _fuse(graph, node, *found)
        report.did(node.name)
    graph.cleanup()
    return report


def _match(minus: Node, plus: Node) -> tuple[Value, Array, Array] | str:
    """(x, cos, sin), or why this is not the rotation of two halves."""
    terms = [_term(t) for t in (*minus.inputs, *plus.inputs)]
    if any(t is None for t in terms):
        return "not products of halves and constants"
    (x, first, cos), (x1, second, sin), (x2, third, sin1), (x3, fourth, cos1) = [t for t in terms if t is not None]
    if not (x is x1 and x is x2 and x is x3) or (first, second, third, fourth) != (0, 1, 0, 1):
        return "not the two halves of one value"
    if not (np.array_equal(cos, cos1) and np.array_equal(sin, sin1)):
        return "the halves rotate by different angles"
    _, tokens, _, width = x.shape
    if cos.size != tokens * width // 2 or cos.shape != sin.shape or cos.ndim != 4 or cos.shape[1] != tokens:
        return "the angles are not one per token and channel pair"
    return x, cos, sin


def _term(value: Value) -> tuple[Value, int, Array] | None:
    """(x, which half, table) of half(x)·table."""
    product = made_by(value, "Mul")
    operand = constant_operand(product) if product else None
    cut = made_by(operand[0], "Slice") if operand else None
    if operand is None or cut is None or len(cut.inputs) != 4 or integers(cut.inputs[3]) not in ([3], [-1]):
        return None
    half = cut.inputs[0].shape[-1] // 2
    for index in (0, 1):
        if integers(cut.inputs[1]) == [index * half] and integers(cut.inputs[2]) == [(index + 1) * half]:
            return cut.inputs[0], index, operand[1].values
    return None


def _swapped(node: Node) -> tuple[Value, Array, Array] | None:
    """(x, C, S') where `node` is x·C + swap(x)·S'."""
    products = [made_by(t, "Mul") for t in node.inputs]
    operands = [constant_operand(one) if one else None for one in products]
    for own, other in (operands, operands[::-1]):
        gather = made_by(other[0], "Gather") if own and other else None
        if own is None or other is None or gather is None or gather.inputs[0] is not own[0]:
            continue
        x, rank = own[0], len(own[0].shape)
        pairs = np.arange(x.shape[-1] // 2 * 2).reshape(-1, 2)[:, ::-1].reshape(-1).tolist()
        if integers(gather.inputs[1]) == pairs and gather.attrs.get("axis", 0) in (-1, rank - 1):
            return x, np.asarray(own[1].values), np.asarray(other[1].values)
    return None


def _interleaved(x: Value, cosines: Array, sines: Array) -> tuple[Array, Array] | str:
    """(cos, sin) with as many axes as x, D/2 at the end, or why the kernel does not do this."""
    rank = len(x.shape)
    tables = [table.reshape((1,) * (rank - table.ndim) + table.shape) for table in (cosines, sines)]
    axis = 1 if rank == 3 or tables[0].shape[1] > 1 else 2
    expected = tuple(n if i in (axis, rank - 1) else 1 for i, n in enumerate(x.shape))
    if rank not in (3, 4) or any(table.shape != expected for table in tables) or np.dtype(x.dtype) != np.float32:
        return "the angles are not one per token and channel pair"
    cos, sin = tables[0][..., ::2], tables[1][..., 1::2]
    if not (np.array_equal(cos, tables[0][..., 1::2]) and np.array_equal(sin, -tables[1][..., ::2])):
        return "the two channels of a pair turn differently"
    return cos, sin


def _fuse(graph: Graph, node: Node, x: Value, cos: Array, sin: Array, interleaved: int = 0) -> None:
    """cos, sin: as many axes as x, tokens along the same one."""
    as_it_is = len(x.shape) == 3 or cos.shape[1] == 1  # [B, S, D] or [B, H, S, D]
    width, tokens = x.shape[-1], cos.size // cos.shape[-1]
    path = node.name.rsplit("/", 1)[0]

    def reshaped(value: Value, shape: list[int], name: str) -> Value:
        target = graph.constant(graph.fresh(f"{path}/{name}.shape"), np.array(shape, np.int64))
        return graph.add_node("Reshape", [value, target], graph.fresh(f"{path}/{name}"), dtype=x.dtype, shape=shape)

    flat = list(x.shape) if as_it_is else [x.shape[0], tokens, x.shape[2] * width]
    before = made_by(x, "Reshape")
    source = x if as_it_is else before.inputs[0] if before and list(before.inputs[0].shape) == flat else None
    source = reshaped(x, flat, "Tokens") if source is None else source
    operands = [
        source,
        graph.constant(graph.fresh(f"{path}/Rotary.offset"), np.zeros(1, np.int64)),
        graph.constant(graph.fresh(f"{path}/Rotary.cos"), cos.reshape(tokens, width // 2)),
        graph.constant(graph.fresh(f"{path}/Rotary.sin"), sin.reshape(tokens, width // 2)),
    ]
    turned = graph.add_node(
        "RotaryEmbedding", operands, graph.fresh(f"{path}/Rotary"), dtype=x.dtype, shape=flat, domain="com.microsoft",
        attrs={"interleaved": 1} if interleaved else None,
    )  # fmt: skip
    old = node.outputs[0]
    node.outputs.clear()
    graph.replace_uses(old, turned if as_it_is else reshaped(turned, list(x.shape), "Heads"))
