"""The norm in front of a rotary embedding, the embedding and the quantizer of its heads in one kernel.

Legend: x[B, S, H·D]; R ≤ D channels of a head turn; cos, sin[S, R/2].

    RotaryEmbedding(x, 0, cos, sin)                                         ->  Rope(x, cos, sin)
    x / √(mean(x²) + ε) · w[H·D] in front of it                             ->  norm rms, weight
    the same, or LayerNormalization(w[D], b[D]), of x as [B, S, H, D]       ->  norm rms_head or layer_head, bias
    a Rope that only quantizes, one scale a head, behind it                 ->  out_scale: codes instead of floats

Exact up to the rounding of intermediate values. A Rope that quantizes takes a norm in front of it without an embedding
in between, too. A step moves in when nobody else reads what it reads.
"""

from __future__ import annotations

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node
from vdq_export.graphs.match import integers, made_by, readers
from vdq_export.targets.cuda._fused import absorb, add, is_fused, is_output, next_node, operand, put, remove, result
from vdq_export.targets.cuda._layouts import reshaped
from vdq_export.targets.cuda._norms import norm_of
from vdq_export.targets.cuda._operands import channels

NAME = "fuse_rope"


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        made = node if is_fused(node, "Rope") else _embedding(graph, node, report)
        if made is None or not made.outputs:
            continue
        done = [] if made is node else ["embedding"]
        if made is not node and _quantizer(graph, made):
            done.append("quantize")
        if made.attrs["norm"] == "none" and _norm(graph, made):
            done.append(made.attrs["norm"])
        if done:
            report.did(f"{made.name}: {', '.join(done)}")
    graph.cleanup()
    return report


def _embedding(graph: Graph, node: Node, report: PassReport) -> Node | None:
    if node.op != "RotaryEmbedding" or node.domain != "com.microsoft" or not node.outputs:
        return None
    (x, positions, cos, sin), turned = node.inputs, int(node.attrs.get("rotary_embedding_dim", 0))
    heads = int(node.attrs.get("num_heads", 0)) or x.shape[-1] // (turned or 2 * cos.shape[-1])
    reason = ""
    if len(x.shape) != 3:
        reason = f"x is {list(x.shape)}, not [B, S, C]"
    elif integers(positions) != [0] or cos.shape[0] != x.shape[1]:
        reason = "positions do not count from 0, or the tables are of other tokens"
    elif node.attrs.get("scale", 1.0) != 1.0 or node.attrs.get("is_packed_batching", 0):
        reason = "a scaled or packed embedding"
    if reason:
        report.skip(node.name, reason)
        return None
    old, name = node.outputs[0], graph.fresh(f"{node.name}/Fused")
    remove(node)
    attrs = {"heads": heads, "norm": "none", "interleaved": int(node.attrs.get("interleaved", 0))}
    return add(graph, "Rope", name, {"x": x, "cos": cos, "sin": sin}, {"y": old}, attrs)


def _quantizer(graph: Graph, node: Node) -> bool:
    """Take in the Rope behind this one, if it only quantizes."""
    reader = next_node(graph, result(node, "y"), "Rope")
    if reader is None or operand(reader, "cos") is not None or reader.attrs["norm"] != "none":
        return False
    if reader.attrs["heads"] != node.attrs["heads"] or reader.inputs[0] is not result(node, "y"):
        return False
    put(node, out_scale=operand(reader, "out_scale"))
    node.attrs["out_type"] = reader.attrs["out_type"]
    absorb(node, reader)
    return True


def _norm(graph: Graph, node: Node) -> bool:
    """Take in the norm in front, over all channels or over those of each head."""
    x, heads = node.inputs[0], node.attrs["heads"]
    apart = [*x.shape[:2], heads, x.shape[-1] // heads]
    merged = made_by(x, "Reshape")
    value = merged.inputs[0] if merged is not None and list(merged.inputs[0].shape) == apart else x
    per_head = value is not x
    found = norm_of(graph, value)
    alone = all(len(readers(one)) == 1 and not is_output(graph, one) for one in (x, value))
    if found is None or not alone or (found.kind == "layer" and not per_head):
        return False
    weight, bias = (one and channels(graph, one) for one in (found.weight, found.bias))
    put(node, x=reshaped(graph, found.x, x.shape), weight=weight, bias=bias)
    node.attrs.update(norm=f"{found.kind}_head" if per_head else found.kind, epsilon=found.epsilon)
    return True
