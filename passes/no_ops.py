"""Remove nodes that change nothing.

    Identity(x), Dropout(x)                          ->  x
    Cast(x, to=dtype(x)), CastLike(x, like) same     ->  x
    Reshape(Reshape(x, _), s)                        ->  Reshape(x, s)
    Transpose(x, identity perm)                      ->  x
    Transpose(Transpose(x, p), q)                    ->  Transpose(x, p∘q)

Exact: every value keeps its bytes. Graph outputs keep their producer, so an output is never an input by another name.
"""

from __future__ import annotations

import numpy as np
import onnx

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant

NAME = "no_ops"
AFTER = ("fold_constants",)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op in ("Reshape", "Transpose") and _merge(node):
            report.did(f"{node.name}: merged with the {node.op} before it")
        source = _same_as(node)
        if source is not None and not any(o is node.outputs[0] for o in graph.gs.outputs):
            graph.replace_uses(node.outputs[0], source)
            report.did(f"{node.name}: removed")
    graph.cleanup()
    return report


def _merge(node: Node) -> bool:
    """Let a Reshape or Transpose read what the same op before it read."""
    before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if before is None or before.op != node.op:
        return False
    if node.op == "Reshape":
        shape = node.inputs[1]
        if not is_constant(shape) or (shape.values <= 0).any():
            return False  # 0 and -1 refer to the shape in between
    elif "perm" in before.attrs and "perm" in node.attrs:
        node.attrs["perm"] = [before.attrs["perm"][i] for i in node.attrs["perm"]]
    else:
        return False
    node.inputs[0] = before.inputs[0]
    return True


def _same_as(node: Node) -> Value | None:
    """The value that node's output equals, or None."""
    if not node.inputs:
        return None
    source = node.inputs[0]
    if node.op in ("Identity", "Dropout"):
        return source
    if node.op == "Cast" and source.dtype is not None:
        same = _onnx_type(source) == node.attrs["to"]
    elif node.op == "CastLike" and source.dtype is not None:
        same = source.dtype == node.inputs[1].dtype
    else:
        perm = list(node.attrs.get("perm", []))
        same = node.op == "Transpose" and bool(perm) and perm == sorted(perm)
    return source if same else None


def _onnx_type(value: Value) -> int:
    """The ONNX number of a value's type; graphs give types that numpy has not (bfloat16) as that number already."""
    if isinstance(value.dtype, int):
        return value.dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)))
