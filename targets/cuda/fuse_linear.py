"""Linears on codes, and quantizers as kernels of their own.

Legend: K input, N output channels, g channels of a group; codes: q − 128 of a uint8, q of an int8 or float8 quantizer.

    [Clip ->] QuantizeLinear(x)                                   ->  Normalize(x) -> codes        one a quantizer
    MatMul or Gemm(DequantizeLinear(q), DequantizeLinear(w[K, N])) [+ b[N]]
                                                                  ->  Linear(codes, w, s_w, scale, zero, b)
    MatMul(x, DequantizeLinear(w))  integers, x in float          ->  Linear(x, w, s_w, b)

Exact: (q − z) = (codes − (z − 128)). Codes multiply integers or float8 multiply float8; where types do not go together
the kernel that takes x in float does it, and has what DequantizeLinear made. A quantizer that others read too stays
beside its kernel. Later rewrites take the quantizers into what makes x.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant
from vdq_export.graphs.match import made_by, other_input
from vdq_export.targets.cuda._fused import add, next_node, remove, result
from vdq_export.targets.cuda.quantizers import Quantizer, code_type, codes_of, read, type_name

NAME = "fuse_linear"
Key = tuple[int | str | bytes, ...]  # of a quantizer: the value and the numbers
_WEIGHTS = {"int8": "int8", "int4": "int4", "float8_e4m3fn": "float8e4m3fn"}


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    codes: dict[Key, tuple[Value, Quantizer]] = {}
    for node in graph.nodes:
        weight = made_by(node.inputs[1], "DequantizeLinear") if node.op in ("MatMul", "Gemm") else None
        if weight is None or not is_constant(weight.inputs[0]):
            continue
        found = _weight(weight) or _product(node)
        if found:
            report.skip(node.name, found)
            continue
        reason = _fuse(graph, node, weight, codes)
        if reason:
            report.skip(node.name, reason)
        else:
            report.did(node.name)
    graph.cleanup()
    return report


def _weight(node: Node) -> str:
    """Why no kernel takes this weight; empty where one does."""
    values, scale = node.inputs[0], node.inputs[1]
    if type_name(values) not in _WEIGHTS or len(values.shape) != 2 or not is_constant(scale):
        return f"no kernel for a weight of {type_name(values)} and rank {len(values.shape)}"
    if len(node.inputs) > 2 and np.asarray(node.inputs[2].values).astype(np.float32).any():
        return "the weight has zero points"
    (k, n), group, axis = values.shape, int(node.attrs.get("block_size", 0)), int(node.attrs.get("axis", 1)) % 2
    if group and (axis, list(scale.shape)) != (0, [k // group, n]):
        return "the weight's groups are not along its input channels"
    if not group and (list(scale.shape) not in ([n], [], [1]) or (len(scale.shape) and axis != 1)):
        return "the weight's scales are not one an output channel"
    return ""


def _product(node: Node) -> str:
    rest = {k: v for k, v in node.attrs.items() if v != {"alpha": 1.0, "beta": 1.0}.get(k, 0)}
    if rest:
        return f"a Gemm with {', '.join(sorted(rest))}"
    if len(node.inputs) > 2 and list(node.inputs[2].shape) not in ([node.outputs[0].shape[-1]], []):
        return "what the Gemm adds is no bias"
    return ""


def _fuse(graph: Graph, node: Node, weight: Node, codes: dict[Key, tuple[Value, Quantizer]]) -> str:
    path, values, kind = node.name.rpartition("/")[0] or node.name, weight.inputs[0], ""
    weight_type = _WEIGHTS[type_name(values)]
    x: tuple[Value, Quantizer | None] = (node.inputs[0], None)
    quantize = codes_of(node.inputs[0])
    if quantize is not None:
        given = _quantize(graph, quantize, codes)
        kind = given if isinstance(given, str) else given[1].dtype
        if not isinstance(given, str) and (kind == "float8e4m3fn") == (weight_type == "float8e4m3fn"):
            x = given
    if x[1] is None and weight_type == "float8e4m3fn":
        return f"float8 weights multiply float8 codes only{f': {kind}' if kind else ''}"
    last, bias = node, node.inputs[2] if len(node.inputs) > 2 else None
    after = next_node(graph, node.outputs[0], "Add") if bias is None else None
    other = other_input(after, node.outputs[0]) if after else None
    if after is not None and other is not None and is_constant(other) and list(other.shape) == [values.shape[1]]:
        last, bias = after, other
    old = last.outputs[0]
    remove(last)
    add(
        graph, "Linear", graph.fresh(f"{path}/Linear"),
        {
            "x": x[0], "weight": values, "weight_scale": _per_channel(graph, weight), "bias": _unless_zero(bias),
            "x_scale": x[1] and x[1].scale, "x_zero": x[1] and x[1].zero,
        },
        {"y": old},
        {"weight_type": weight_type, "group": int(weight.attrs.get("block_size", 0))},
    )  # fmt: skip
    return ""


def _quantize(graph: Graph, node: Node, codes: dict[Key, tuple[Value, Quantizer]]) -> tuple[Value, Quantizer] | str:
    """(codes, what they mean) of a QuantizeLinear, by one kernel for all of the same value and numbers; or why not."""
    found = read(graph, node)
    if isinstance(found, str) or found.axis is not None:
        return found if isinstance(found, str) else "one scale a channel"
    key = (id(found.value), *found.key)
    if key not in codes:
        made = add(
            graph, "Normalize", graph.fresh(f"{node.name.rpartition('/')[0] or node.name}/Codes"),
            {"x": found.value, "out_scale": found.scale, "out_zero": found.zero},
            {"q": (code_type(found.dtype), node.outputs[0].shape)},
            {"norm": "none", **found.attrs},
        )  # fmt: skip
        codes[key] = result(made, "q"), found
    return codes[key]


def _per_channel(graph: Graph, weight: Node) -> Value:
    """The weight's scales, one an output channel where it has one for all."""
    scale, n = weight.inputs[1], weight.inputs[0].shape[1]
    if len(scale.shape) == 2 or list(scale.shape) == [n]:
        return scale
    return graph.derived(graph.fresh(f"{scale.name}.channels"), scale, lambda one: np.full(n, one, np.float32), [n])


def _unless_zero(bias: Value | None) -> Value | None:
    return None if bias is None or (is_constant(bias) and not np.asarray(bias.values).any()) else bias
