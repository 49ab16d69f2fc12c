"""Names for the nodes of somebody else's graph: "<module path>/<Op>", as traced ones have them.

The path is, in this order: the module scope that torch's exporter wrote into the node's metadata; the scope within the
node's name ("/blocks.0/attn/to_q/MatMul", or our own "blocks.0.attn.to_q/MatMul"); the path of the weight that a linear
reads ("blocks.0.attn.to_q.weight"); the node's own name. Recipes' patterns then mean the same layers.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHED = ("MatMul", "Gemm", "Conv")


def apply(model: ir.Model) -> None:
    """Rename every node and its outputs in place; the graph's inputs and initializers keep their names."""
    graph = model.graph
    ends = {id(value) for value in [*graph.inputs, *graph.outputs]}
    taken = Counter(str(value.name) for value in graph.inputs)
    taken.update(graph.initializers.keys())

    def unique(name: str) -> str:
        taken[name] += 1
        if taken[name] == 1:
            return name
        return unique(f"{name}_{taken[name] - 1}")

    for number, node in enumerate(graph):
        node.name = unique(f"{_path(node) or f'node{number}'}/{node.op_type}")
        for index, output in enumerate(node.outputs):
            if id(output) not in ends:
                output.name = node.name if index == 0 else f"{node.name}:{index}"


def _path(node: ir.Node) -> str:
    return _scope(node) or _within_name(node) or _of_weight(node) or (node.name or "").strip("/").replace("/", ".")


def _scope(node: ir.Node) -> str:
    """The innermost module among the scopes torch recorded: a list from "" to the node's own name."""
    text = node.metadata_props.get(_SCOPES)
    if text is None:
        return ""
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""


def _within_name(node: ir.Node) -> str:
    """ "a.b" of "/a/b/MatMul", "a.b/MatMul_1": the operator's type comes last."""
    *scope, last = (node.name or "").split("/")
    if last.split("_")[0] != node.op_type:
        return ""
    parts: list[str] = []
    for part in filter(None, scope):
        if parts and part.startswith(f"{parts[-1]}."):  # torch's older exporter: "/time/time.0" of a Sequential
            parts.pop()
        parts.append(part)
    return ".".join(parts)


def _of_weight(node: ir.Node) -> str:
    """The path of the parameter that a linear reads, perhaps through a Transpose."""
    if node.op_type not in _WEIGHED or len(node.inputs) < 2:
        return ""
    weight = node.inputs[1]
    maker = None if weight is None else weight.producer()
    if maker is not None and maker.op_type == "Transpose":
        weight = maker.inputs[0]
    if weight is None or not weight.is_initializer():
        return ""
    name = str(weight.name)
    return name.removesuffix(".T").removesuffix(".weight") if ".weight" in name else ""
