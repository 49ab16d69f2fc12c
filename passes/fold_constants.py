"""Evaluate what depends on constants only.

    node(constants …)           ->  constant
    Shape(x), x of known shape  ->  constant

A shape that was unknown because it depended on a constant (as of NonZero of a fixed mask) is inferred anew, which may
make more constants. Exact: onnxruntime computes the values once, at export, with the kernels it would use at run time.
What several blocks compute alike, as their rotary tables, is computed once, and their constants hold one array.
Transposed weights are left to the `linear` pass, which makes views of them instead of copies; nothing above LIMIT_BYTES
is made, and nothing of weights that are not bound yet.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx

from vdq_export import ort
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, Value, is_constant, is_unbound
from vdq_export.passes._alike import alike

NAME = "fold_constants"
AFTER: tuple[str, ...] = ()
LIMIT_BYTES = 64 * 2**20
_NOT_REPEATABLE = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    while True:
        report.skipped.clear()
        _fold(graph, report)
        if not (_fold_shapes(graph, report) + _infer_shapes(graph)):
            return report


def _fold(graph: Graph, report: PassReport) -> None:
    foldable = _foldable(graph, report)
    inside = {id(node) for node in foldable}
    frontier = [o for n in foldable for o in n.outputs if any(id(r) not in inside for r in o.outputs)]
    if not frontier:
        return
    numbers = alike(foldable)
    first = {numbers[id(o)]: o.name for o in reversed(frontier)}
    found = _evaluate(graph, list(first.values()))
    values = {o.name: found[first[numbers[id(o)]]] for o in frontier}
    for output in frontier:
        readers = [r for r in output.outputs if id(r) not in inside]
        constant = graph.constant(graph.fresh(f"{output.name}.value"), values[output.name])
        for reader in {id(r): r for r in readers}.values():
            for index, operand in enumerate(reader.inputs):
                if operand is output:
                    reader.inputs[index] = constant
        report.did(output.name)
    graph.cleanup()


def _fold_shapes(graph: Graph, report: PassReport) -> int:
    """Replace Shape of values whose shape is known; how many."""
    outputs = {id(o) for o in graph.gs.outputs}
    done = 0
    for node in graph.nodes:
        if node.op != "Shape" or id(node.outputs[0]) in outputs or not _is_static(node.inputs[0]):
            continue
        entries = node.inputs[0].shape[node.attrs.get("start", 0) : node.attrs.get("end")]
        constant = graph.constant(graph.fresh(f"{node.name}.value"), np.array(entries, np.int64))
        graph.replace_uses(node.outputs[0], constant)
        node.outputs.clear()
        report.did(node.name)
        done += 1
    if done:
        graph.cleanup()
    return done


def _infer_shapes(graph: Graph) -> int:
    """Infer the shapes that are not static, constants being known now; how many became so."""
    unknown = {v.name: v for node in graph.nodes for v in node.outputs if v.name and not _is_static(v)}
    if not unknown:
        return 0
    proto, _ = graph.skeleton()
    proto.graph.ClearField("value_info")
    for output in proto.graph.output:
        if output.name in unknown:
            output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    done = 0
    for info in [*inferred.value_info, *inferred.output]:
        dims = info.type.tensor_type.shape.dim
        if (
            info.name in unknown
            and info.type.tensor_type.HasField("shape")
            and all(d.HasField("dim_value") for d in dims)
        ):
            unknown[info.name].shape = [d.dim_value for d in dims]
            done += 1
    return done


def _is_static(value: Value) -> bool:
    return value.shape is not None and all(isinstance(entry, int) for entry in value.shape)


def _foldable(graph: Graph, report: PassReport) -> list[Node]:
    """Nodes all of whose inputs are constants or outputs of such nodes, in order."""
    known: set[int] = set()
    found = []
    for node in graph.nodes:
        computed = [t for t in node.inputs if not t.is_empty() and (not is_constant(t) or is_unbound(t))]
        if node.op in _NOT_REPEATABLE or not all(id(t) in known for t in computed) or _is_weight_transpose(node):
            continue
        size = sum(prod(o.shape) * 4 for o in node.outputs if o.shape and _is_static(o))
        if size > LIMIT_BYTES:
            report.skip(node.name, f"its {size / 2**20:.0f} MiB would be stored in the graph")
            continue
        known.update(id(o) for o in node.outputs)
        found.append(node)
    outputs = {id(o) for o in graph.gs.outputs}
    return [n for n in found if not any(id(o) in outputs for o in n.outputs)]


def _is_weight_transpose(node: Node) -> bool:
    if node.op != "Transpose" or not is_constant(node.inputs[0]):
        return False
    weight = node.inputs[0]
    if len(weight.shape) != 2 or np.issubdtype(weight.dtype, np.integer):
        return False
    return any(reader.op in ("MatMul", "Gemm", "Cast") for reader in node.outputs[0].outputs)  # else a table


def _evaluate(graph: Graph, names: list[str]) -> dict[str, Array]:
    """Values of constant-only `names`, computed in a copy of the graph that has nothing else."""
    part = graph.copy()
    values = part.values()
    part.gs.inputs, part.gs.outputs = [], [values[name] for name in names]
    part.gs.cleanup().toposort()
    return ort.run(part, {})
