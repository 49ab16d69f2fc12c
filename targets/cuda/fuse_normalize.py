"""A norm and all that stands between it and the linears that read it, in one kernel.

Legend: x[..., C]; v: the kernel's value; in this order, each or none:

    LayerNormalization(x), or x / √(mean(x²) + ε)                    ->  norm, epsilon, weight[C], bias[C]
    Gelu(v) or v · Sigmoid(v)                                        ->  act
    v · a[B, 1, C], v + b[B, 1, C]                                   ->  scale, shift (modulation)
    v · c[C] or v / c[C], constants                                  ->  smooth, behind a rotation post
    v in blocks · Hadamard matrix                                    ->  hadamard
    Normalize(v) that only quantizes                                 ->  out_scale, out_zero: codes beside v or instead

Exact up to the rounding of intermediate values, which stay in float32 registers. A step moves in when nobody else reads
what it reads. Rotations, and smoothing in front of a quantizer, get a kernel without a norm in front of them too.
"""

from __future__ import annotations

from typing import Any

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value
from vdq_export.graphs.match import constant_operand, other_input, readers
from vdq_export.targets.cuda._fused import absorb, add, held, next_node, operand, put, remove
from vdq_export.targets.cuda._norms import norm_at
from vdq_export.targets.cuda._operands import channels, is_channels, is_rows
from vdq_export.targets.cuda._rotations import Rotation, rotation_at
from vdq_export.targets.cuda._steps import only_quantizes, take_activation, take_quantizer

NAME = "fuse_normalize"
_STEPS = ("act", "scale", "shift", "smooth", "hadamard", "post")
_ACT, _SCALE, _SHIFT, _SMOOTH, _HADAMARD, _POST = range(len(_STEPS))


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if not node.outputs:  # taken into one before it
            continue
        made = _norm(graph, node) or _rotation(graph, node, report) or _smoothing(graph, node)
        if made is None:
            continue
        done = [made.attrs["norm"]]
        while step := _step(graph, made):
            done.append(step)
        if take_quantizer(graph, made):
            done.append("quantize")
        report.did(f"{made.name}: {', '.join(done)}")
    graph.cleanup()
    return report


def _norm(graph: Graph, node: Node) -> Node | None:
    """A kernel in the place of a norm."""
    found = norm_at(node)
    return found and _made(graph, node, {"x": found.x, "weight": found.weight, "bias": found.bias}, found.attrs)


def _rotation(graph: Graph, node: Node, report: PassReport) -> Node | None:
    """A kernel in the place of a rotation that no norm stands in front of."""
    found = rotation_at(graph, node) if node.op in ("Reshape", "MatMul") else None
    if isinstance(found, str):
        report.skip(node.name, found)
    if found is None or isinstance(found, str):
        return None
    x, (*first, last) = node.inputs[0], found.nodes
    remove(*first)
    made = _made(graph, last, {"x": x}, {"norm": "none"})
    _turn(graph, made, found)
    return made


def _smoothing(graph: Graph, node: Node) -> Node | None:
    """A kernel in the place of a product with constants, where a rotation or a quantizer comes behind it."""
    pair = constant_operand(node) if node.op == "Mul" else None
    if pair is None or not is_channels(pair[1], pair[0].shape[-1]):
        return None
    product = node.outputs[0]
    turned = next_node(graph, product, "Reshape", "MatMul")
    rotation = rotation_at(graph, turned) if turned else None
    if not isinstance(rotation, Rotation) and not any(only_quantizes(one) for one in readers(product)):
        return None
    return _made(graph, node, {"x": pair[0], "smooth": channels(graph, pair[1])}, {"norm": "none"})


def _made(graph: Graph, node: Node, operands: dict[str, Value | None], attrs: dict[str, Any]) -> Node:
    old = node.outputs[0]
    remove(node)
    path = graph.fresh(f"{node.name.rpartition('/')[0] or node.name}/Normalize")
    return add(graph, "Normalize", path, operands, {"y": old}, attrs)


def _step(graph: Graph, node: Node) -> str:
    """Take in the step behind the kernel's y; returns its name."""
    y, last = held(node, "y"), max([i for i, step in enumerate(_STEPS) if _has(node, step)], default=-1)
    if last < _ACT and take_activation(graph, node):
        return "act"
    turned = next_node(graph, y, "Reshape", "MatMul") if last < _HADAMARD else None
    rotation = rotation_at(graph, turned) if turned else None
    if isinstance(rotation, Rotation):
        *first, last = rotation.nodes
        remove(*first)
        absorb(node, last)
        _turn(graph, node, rotation)
        return "hadamard"
    reader = next_node(graph, y, "Mul", "Add")
    other = other_input(reader, y) if reader else None
    if reader is None or other is None or list(reader.outputs[0].shape) != list(y.shape):
        return ""
    name = _product(graph, node, reader, other, last) if reader.op == "Mul" else _sum(node, other, last)
    if name:
        absorb(node, reader)
        put(node, **{name: other if name in ("scale", "shift") else channels(graph, other)})
    return name


def _has(node: Node, step: str) -> bool:
    if step in ("act", "hadamard"):
        return node.attrs.get(step, "none") not in ("none", 0)
    return operand(node, step) is not None


def _has_norm(node: Node) -> bool:
    return bool(node.attrs["norm"] != "none")


def _product(graph: Graph, node: Node, reader: Node, other: Value, last: int) -> str:
    """What a product with `other` is to the kernel; constants are the norm's weight, modulation or smoothing."""
    product = reader.outputs[0]
    constant = is_channels(other, product.shape[-1])
    if constant and last < 0 and _has_norm(node) and not _has(node, "weight") and not _has(node, "bias"):
        return "weight"
    if last < _SCALE and is_rows(other, product.shape) and not (constant and next_node(graph, product, "Add") is None):
        return "scale"
    return "" if not constant or last >= _POST else "smooth" if last < _SMOOTH else "post"


def _sum(node: Node, other: Value, last: int) -> str:
    shape = held(node, "y").shape
    if last < 0 and _has_norm(node) and not _has(node, "bias") and is_channels(other, shape[-1]):
        return "bias"
    return "shift" if last < _SHIFT and is_rows(other, shape) else ""


def _turn(graph: Graph, node: Node, rotation: Rotation) -> None:
    node.attrs["hadamard"] = rotation.block
    if rotation.scale is not None:
        put(node, post=graph.constant(graph.fresh(f"{node.name}.post"), rotation.scale))
