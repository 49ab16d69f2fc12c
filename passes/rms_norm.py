"""RMSNorm in the form that divides.

Legend: x[..., C]. torch writes rsqrt, which exports as Sqrt and Reciprocal:

    Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2)), ε))))   ->   Div(x, Sqrt(Add(ReduceMean(Pow(x, 2)), ε)))
    Mul(g, y)  behind it, g[C] constant                        ->   Mul(y, g)

Exact up to the rounding of one division. Two reasons: a 16-bit Reciprocal is wrong on at least one NPU as soon as 1/x
leaves [0, 1], where Div holds at every scale; and onnxruntime fuses exactly this form (SimplifiedLayerNormalization).
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, is_constant
from vdq_export.graphs.match import is_root_mean_square, made_by, other_input, sole_reader

NAME = "rms_norm"
AFTER = ("fold_constants", "no_ops")


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op != "Reciprocal" or (root := made_by(node.inputs[0], "Sqrt")) is None:
            continue
        scale = sole_reader(node.outputs[0], "Mul")
        if scale is None:
            report.skip(node.name, "1/√ is read by more than one Mul")
            continue
        value = other_input(scale, node.outputs[0])
        if value is None or not is_root_mean_square(root, value):
            report.skip(node.name, "√ is not of the mean square of what is scaled")
            continue
        scale.op = "Div"
        scale.inputs[0], scale.inputs[1] = value, root.outputs[0]
        _gain_last(scale)
        report.did(scale.name)
    graph.cleanup()
    return report


def _gain_last(division: Node) -> None:
    gain = sole_reader(division.outputs[0], "Mul")
    if gain is not None and is_constant(gain.inputs[0]):
        gain.inputs[0], gain.inputs[1] = gain.inputs[1], gain.inputs[0]
