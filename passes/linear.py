"""One form for every linear.

    MatMul(x, Transpose(W[N, K]))          ->  MatMul(x, Wt[K, N])
    Gemm(x, W, b, transB, alpha=beta=1)    ->  Add(MatMul(x, Wt[K, N]), b[N])
    Add(b, y)                              ->  Add(y, b)  behind such a MatMul
    several MatMuls of one module          ->  path, path.1, path.2: each a layer with weights of its own

Exact: the same products in the same order; Wt is a view, so no weight is copied. The constant keeps its parameter's
name. Everything downstream (observers, plan, smoothing, QDQ) then knows a linear by this one form.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Graph, Node, Value, is_constant, is_promise

NAME = "linear"
AFTER = ("fold_constants",)


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        if node.op == "MatMul" and _is_transposed_weight(node.inputs[1]):
            weight = node.inputs[1].inputs[0].inputs[0]
            node.inputs[1] = _transposed(graph, weight)
            report.did(node.name)
        elif node.op == "Gemm" and is_constant(node.inputs[1]):
            reason = _split_gemm(graph, node)
            if reason:
                report.skip(node.name, reason)
            else:
                report.did(node.name)
    graph.cleanup()
    for name in _told_apart(graph):
        report.did(name)
    return report


def _told_apart(graph: Graph) -> list[str]:
    """Name each layer once, and give none the weight of another: what is folded into it belongs to one input.

    A module that is called twice, or that multiplies by parts of one parameter, has several layers of its path.
    """
    renamed, names, weights = [], set[str](), set[int]()
    for linear in graph.linears():
        matmul, count, name = linear.matmul, 0, linear.name
        while name in names:
            count += 1
            name = f"{linear.name}.{count}"
        if name != linear.name:
            matmul.name = graph.fresh(f"{name}/MatMul")
            renamed.append(matmul.name)
        if id(linear.weight) in weights:
            matmul.inputs[1] = _copied(graph, linear.weight, f"{name}.weight")
        names.add(name)
        weights.add(id(matmul.inputs[1]))
    return renamed


def _copied(graph: Graph, weight: Value, name: str) -> Value:
    if is_promise(weight):
        return graph.derived(graph.fresh(name), weight, np.asarray)
    return graph.constant(graph.fresh(name), weight.values)


def _is_transposed_weight(tensor: Value) -> bool:
    makers = tensor.inputs
    return bool(
        makers
        and makers[0].op == "Transpose"
        and is_constant(makers[0].inputs[0])
        and len(makers[0].inputs[0].shape) == 2
        and list(makers[0].attrs.get("perm", [1, 0])) == [1, 0]
    )


def _transposed(graph: Graph, weight: Value) -> Value:
    """The constant holding weight.T, made once per weight and named after it once nothing reads the original."""
    name = f"{weight.name}.T"
    existing = graph.values().get(name)
    if existing is not None:
        return existing
    if is_promise(weight):
        return graph.derived(name, weight, np.transpose, weight.shape[::-1])
    return graph.constant(name, weight.values.T)


def _split_gemm(graph: Graph, node: Node) -> str | None:
    """Rewrite one Gemm; returns why not, or None when done."""
    attrs = node.attrs
    if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return "Gemm with transA, alpha or beta"
    weight = node.inputs[1]
    matrix = _transposed(graph, weight) if attrs.get("transB", 0) else weight
    path = node.name.rsplit("/", 1)[0]
    output = node.outputs[0]
    shape = [*node.inputs[0].shape[:-1], matrix.shape[1]]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not is_constant(bias):
        return "the addend is computed"
    product = graph.add_node(
        "MatMul", [node.inputs[0], matrix], graph.fresh(f"{path}/MatMul"), dtype=np.float32, shape=shape
    )
    result = product
    if bias is not None:
        result = graph.add_node("Add", [product, bias], graph.fresh(f"{path}/Add"), dtype=np.float32, shape=shape)
    node.outputs.clear()
    graph.replace_uses(output, result)
    return None
