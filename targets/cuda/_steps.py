"""Steps behind its sum or norm that several kernels take in: an activation, a quantizer."""

from __future__ import annotations

from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import readers
from vdq_export.targets.cuda._fused import (
    absorb,
    is_fused,
    is_output,
    next_node,
    operand,
    put,
    put_result,
    remove,
    result,
)  # fmt: skip


def take_activation(graph: Graph, node: Node) -> bool:
    """Let the node compute the Gelu, or y · Sigmoid(y), that alone reads its y."""
    y = result(node, "y")
    if y is None or is_output(graph, y):
        return False
    curve, silu = next_node(graph, y, "Gelu"), _silu_of(y)
    if curve is not None:
        node.attrs["act"] = "gelu_tanh" if curve.attrs.get("approximate", "none") == "tanh" else "gelu_erf"
        absorb(node, curve)
    elif silu is not None:
        node.attrs["act"] = "silu"
        remove(*[reader for reader in readers(y) if reader is not silu])
        absorb(node, silu)
    return curve is not None or silu is not None


def take_quantizer(graph: Graph, node: Node) -> bool:
    """Let the node itself give the codes that a quantizer makes of its y; y goes where nobody else reads it."""
    y = result(node, "y")
    if y is None or result(node, "q") is not None:
        return False
    reader = next((one for one in readers(y) if only_quantizes(one)), None)
    if reader is None:
        return False
    codes = result(reader, "q")
    put(node, out_scale=operand(reader, "out_scale"), out_zero=operand(reader, "out_zero"))
    node.attrs |= {name: reader.attrs[name] for name in ("low_level", "high_level", "out_type")}
    remove(reader)
    put_result(node, "q", codes)
    if not readers(y) and not is_output(graph, y):
        put_result(node, "y", None)
    return True


def only_quantizes(node: Node) -> bool:
    steps = ("scale", "shift", "smooth", "post", "down")
    return (
        is_fused(node, "Normalize")
        and result(node, "q") is not None
        and result(node, "y") is None
        and (node.attrs["norm"], node.attrs.get("act", "none"), node.attrs.get("hadamard", 0)) == ("none", "none", 0)
        and all(operand(node, step) is None for step in steps)
    )


def _silu_of(value: Value) -> Node | None:
    """The Mul of value · Sigmoid(value), when nothing else reads the value."""
    found = readers(value)
    curve = next((node for node in found if node.op == "Sigmoid"), None)
    product = next((node for node in found if node.op == "Mul"), None)
    if len(found) != 2 or curve is None or product is None or len(curve.outputs[0].outputs) != 1:
        return None
    return product if any(t is curve.outputs[0] for t in product.inputs) and len(value.outputs) == 2 else None
