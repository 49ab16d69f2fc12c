"""Quantize the operands of the planned attentions with one bin's parameters, one scale a head.

Legend: B batch, S tokens, H heads, D channels a head, C = H·D; s[H]: scales of this bin; f: constant factor.

    MatMul(q[B, H, S, D], k[B, H, D, T]);  MatMul(p, v[B, H, T, D])
      ->  MatMul(q̂, k̂);  MatMul(p, v̂)                             x̂ = DequantizeLinear(QuantizeLinear(x, s), s), axis 1
    com.microsoft.MultiHeadAttention(q[B, S, C], k, v)
      ->  MultiHeadAttention(q̂, k̂, v̂)                             axis 2, each |s / f| repeated D times

It costs what rounding q and k to int8, v to float8e4m3fn costs; zero points are 0. The one node takes q and k in front
of the constants that the plan's scales stand behind (its `scale` is their product), so both forms round to the same
levels. Scores stay float: a kernel multiplies integers, and s_q·s_k is one number a head. Bins differ in scales only.
"""

from __future__ import annotations

from math import isclose

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, Value
from vdq_export.graphs.attention import fused_name
from vdq_export.graphs.match import made_by
from vdq_export.passes import _quantizers
from vdq_export.plan import AttentionOperand, AttentionPlan

NAME = "attention_qdq"
AFTER = ("qdq",)
_FUSED = "MultiHeadAttention"


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    if context.plan is None or context.bin is None:
        return report
    place = context.plan.place(context.bin)
    nodes = {str(node.name): node for node in graph.nodes}
    for one in context.plan.attentions:
        if one.keep_float:
            report.details.append(f"{one.name}: float, {one.keep_float}")
            continue
        found = _edges(nodes, one)
        if isinstance(found, str):
            report.skip(one.name, found)
        elif not all(_is_done(node, index) for node, index in found.values()):
            for letter, (node, index) in found.items():
                _quantize(graph, node, index, one.operands[letter], place)
            report.did(_describe(one))
    graph.cleanup()
    return report


def _edges(nodes: dict[str, Node], one: AttentionPlan) -> dict[str, tuple[Node, int]] | str:
    """{letter: (node, operand)} of the planned operands in the form the graph has, or why they cannot be quantized."""
    node = nodes.get(fused_name(one.name))
    if node is not None and node.op == _FUSED:
        edges = {"q": (node, 0), "k": (node, 1), "v": (node, 2)}
        reason = _mismatch(node, one)
    elif one.name in nodes and one.product in nodes:
        scores, product = nodes[one.name], nodes[one.product]
        edges, reason = {"q": (scores, 0), "k": (scores, 1), "v": (product, 1)}, ""
    else:
        return "the graph has no such attention"
    for letter, planned in one.operands.items():
        at, index = edges[letter]
        value = at.inputs[index]
        wanted = one.heads * planned.channels if at.op == _FUSED else one.heads
        if not _is_done(at, index) and (value.shape is None or value.shape[_axis(at)] != wanted):
            return f"{value.name} is {value.shape}, not of {one.heads} heads of {planned.channels} channels"
    return reason or {letter: edges[letter] for letter in one.operands}


def _mismatch(node: Node, one: AttentionPlan) -> str:
    """Why the fused node is not the planned attention, or nothing."""
    if node.attrs["num_heads"] != one.heads:
        return f"{node.name} has {node.attrs['num_heads']} heads, not {one.heads}"
    if one.q is None or one.k is None:
        return ""
    factor = one.q.factor * one.k.factor
    if not isclose(node.attrs["scale"], factor, rel_tol=1e-5):
        return f"{node.name} multiplies its scores by {node.attrs['scale']:g}, the plan by {factor:g}"
    return ""


def _axis(node: Node) -> int:
    """The axis of an operand of `node` in which its heads lie."""
    return 2 if node.op == _FUSED else 1


def _is_done(node: Node, index: int) -> bool:
    back = made_by(node.inputs[index], "DequantizeLinear")
    return back is not None and "axis" in back.attrs


def _quantize(graph: Graph, node: Node, index: int, planned: AttentionOperand, place: int) -> None:
    value: Value = node.inputs[index]
    scale: Array = np.asarray(planned.bins[place].scale, np.float64)
    if node.op == _FUSED:
        scale = np.repeat(np.abs(scale / planned.factor), planned.channels)
    quantizer = _quantizers.Quantizer(scale.astype(np.float32), 0, planned.dtype, _axis(node))
    node.inputs[index] = _quantizers.round_trip(graph, value, quantizer, value.name)


def _describe(one: AttentionPlan) -> str:
    what = ", ".join(f"{letter} {planned.dtype}" for letter, planned in one.operands.items())
    reasons = [why for why in (one.scores_why, one.values_why) if why]
    return f"{one.name}: {what}" + "".join(f"; float: {why}" for why in reasons)
