"""Attention on codes, with the quantizer of what reads it in the same kernel.

Legend: B batch, S queries, T keys, H heads, D channels a head; q[B, S, H·D], k and v[B, T, H·D].

    MultiHeadAttention(q, k, v[, mask])                     ->  Attention(q, k, v, mask)
    with q and k DequantizeLinear(QuantizeLinear(·)) in int8, one scale a head
                                                            ->  Attention(Rope(q) -> codes, Rope(k) -> codes, v, …)
    and v in float8 too                                     ->  Attention(…, Rope(v) -> codes)

Exact: q·kᵀ of codes times two scales. A Rope that only quantizes is what later rewrites take into the rotation or the
norm in front of it. Where q and k do not both come in int8 the attention is one of floats, of what was dequantized.
"""

from __future__ import annotations

from dataclasses import replace

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.targets.cuda._fused import add, operand, remove, result
from vdq_export.targets.cuda.quantizers import Quantizer, code_type, codes_of, in_table, numbers, read

NAME = "fuse_attention"
_OPERANDS = ("q", "k", "v", "bias", "key_padding_mask", "mask")
_CHANNELS = 2  # the axis of heads and channels in [B, S, H·D]


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    made: dict[int, Value] = {}
    for node in graph.nodes:
        if node.op != "MultiHeadAttention":
            continue
        given = {name: value for name, value in zip(_OPERANDS, node.inputs, strict=False) if value.name}
        if not set(given) <= {"q", "k", "v", "mask"} or len(node.inputs) > len(_OPERANDS) or len(node.outputs) > 1:
            report.skip(node.name, "it has operands that no kernel takes")
            continue
        if node.attrs.get("unidirectional", 0) or any(len(given[one].shape) != 3 for one in "qkv"):
            report.skip(node.name, "a causal mask, or operands that are not [B, S, C]")
            continue
        report.did(f"{node.name}: {_fuse(graph, node, given, made, report)}")
    graph.cleanup()
    return report


def _fuse(graph: Graph, node: Node, given: dict[str, Value], made: dict[int, Value], report: PassReport) -> str:
    """Put the kernel in the node's place; returns what it multiplies."""
    heads = int(node.attrs["num_heads"])
    found = {one: _quantizer(graph, given[one], heads) for one in "qkv"}
    wanted = {"q": "int8", "k": "int8", "v": "float8e4m3fn"}
    taken = {one: how for one, how in found.items() if isinstance(how, Quantizer) and how.dtype == wanted[one]}
    if not {"q", "k"} <= set(taken):
        taken = {}
    for one, why in found.items():
        if one not in taken and why is not None:
            report.skip(node.name, f"{one} in float: {why if isinstance(why, str) else 'not with what comes with it'}")
    scales: dict[str, Value] = {}
    for one, how in taken.items():
        key = id(given[one])
        if key not in made:
            made[key] = _codes(graph, how, heads)
        given |= {one: made[key]}
        scales[f"{one}_scale"] = operand(made[key].inputs[0], "out_scale")
    width = given["q"].shape[-1] // heads
    scale = float(node.attrs.get("scale", 0.0)) or width**-0.5
    old, name = node.outputs[0], graph.fresh(f"{node.name}/Fused")
    remove(node)
    add(graph, "Attention", name, given | scales, {"y": old}, {"heads": heads, "scale": scale})
    return ", ".join(f"{one} in {how.dtype}" for one, how in taken.items()) or "floats"


def _quantizer(graph: Graph, value: Value, heads: int) -> Quantizer | str | None:
    """How codes became `value`[B, S, H·D], one scale a head; None where it is no such value."""
    quantize = codes_of(value)
    if quantize is None:
        return None
    found = read(graph, quantize)
    if isinstance(found, str) or found.zero is not None or found.axis != _CHANNELS:
        return found if isinstance(found, str) else "it has zero points, or one scale for all heads"
    channels = numbers(found.scale)
    if channels is None or channels.shape[1] % heads or channels.shape[1] != value.shape[-1]:
        return f"{found.scale.name} is not one scale a channel"
    apart = channels.reshape(len(channels), heads, -1)
    if (apart != apart[..., :1]).any():
        return "its channels of one head have different scales"
    return replace(found, scale=in_table(graph, found.scale, apart[..., 0]))


def _codes(graph: Graph, how: Quantizer, heads: int) -> Value:
    x = how.value
    made = add(
        graph, "Rope", graph.fresh(f"{x.name.rpartition('/')[0] or x.name}/Codes"),
        {"x": x, "out_scale": how.scale}, {"y": (code_type(how.dtype), x.shape)},
        {"heads": heads, "norm": "none", "out_type": how.dtype},
    )  # fmt: skip
    return result(made, "y")
