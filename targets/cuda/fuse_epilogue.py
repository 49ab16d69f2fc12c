"""What follows a linear or an attention, in its kernel.

Legend: y[..., N] the kernel's sum; in this order, each or none:

    Gelu(y) or y · Sigmoid(y)             ->  act
    y · gate[B, 1, N]                     ->  gate: one row a sample, one for all, or one a token (a gated FFN)
    y + residual[..., N]                  ->  residual
    y · c[N] constant                     ->  post (smoothing of what comes next)
    Normalize(y) that only quantizes      ->  out_scale, out_zero: codes beside y, or instead of it

Exact up to the rounding of intermediate values, which stay in float32 registers. A step moves in when nobody else reads
what it reads; codes may stand beside a y that others read. Attention takes the last step only.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import other_input
from vdq_export.targets.cuda._fused import absorb, is_fused, is_output, next_node, operand, put, result
from vdq_export.targets.cuda._operands import channels, is_channels, is_rows
from vdq_export.targets.cuda._steps import take_activation, take_quantizer

NAME = "fuse_epilogue"
_STEPS = ("act", "gate", "residual", "post")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if not is_fused(node, "Linear", "Attention"):
            continue
        done = _steps(graph, node) if node.op == "Linear" else []
        if take_quantizer(graph, node):
            done.append("quantize")
        if done:
            report.did(f"{node.name}: {', '.join(done)}")
    graph.cleanup()
    return report


def _steps(graph: Graph, node: Node) -> list[str]:
    """Take in what stands behind the linear, step by step; returns the steps taken."""
    done: list[str] = []
    while (y := result(node, "y")) is not None and result(node, "q") is None and not is_output(graph, y):
        last = max([i for i, step in enumerate(_STEPS) if _has(node, step)], default=-1)
        step = "act" if last < 0 and take_activation(graph, node) else ""
        step = step or (_product(graph, node, y, last) if last < _STEPS.index("post") else "")
        step = step or (_sum(graph, node, y) if last < _STEPS.index("residual") else "")
        if not step:
            break
        done.append(step)
    return done


def _has(node: Node, step: str) -> bool:
    return node.attrs.get("act", "none") != "none" if step == "act" else operand(node, step) is not None


def _product(graph: Graph, node: Node, y: Value, last: int) -> str:
    product = next_node(graph, y, "Mul")
    other = other_input(product, y) if product else None
    if product is None or other is None or list(product.outputs[0].shape) != list(y.shape):
        return ""
    count = int(y.shape[-1])
    gates = last < _STEPS.index("gate") and is_rows(other, y.shape)
    if is_channels(other, count) and not (gates and next_node(graph, product.outputs[0], "Add")):
        absorb(node, product)
        put(node, post=channels(graph, other))
        return "post"
    if not gates:
        return ""
    absorb(node, product)
    put(node, gate=other)
    return "gate"


def _sum(graph: Graph, node: Node, y: Value) -> str:
    plus = next_node(graph, y, "Add")
    other = other_input(plus, y) if plus else None
    if plus is None or other is None or list(other.shape) != list(y.shape):
        return ""
    absorb(node, plus)
    put(node, residual=other)
    return "residual"
