"""Evaluate what depends on constants only.

    node(constants …)  ->  constant

Exact: onnxruntime computes the values once, at export, with the kernels it would use at run time. Transposed weights
are left to the `linear` pass, which makes views of them instead of copies, and nothing above LIMIT_BYTES is made.
"""

from __future__ import annotations

from math import prod

from vdq_export import ort
from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Array, Graph, Node, is_constant

NAME = "fold_constants"
AFTER: tuple[str, ...] = ()
LIMIT_BYTES = 64 * 2**20
_NOT_REPEATABLE = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    foldable = _foldable(graph, report)
    inside = {id(node) for node in foldable}
    frontier = [o for n in foldable for o in n.outputs if any(id(r) not in inside for r in o.outputs)]
    if not frontier:
        return report
    values = _evaluate(graph, [o.name for o in frontier])
    for output in frontier:
        readers = [r for r in output.outputs if id(r) not in inside]
        constant = graph.constant(graph.fresh(f"{output.name}.value"), values[output.name])
        for reader in {id(r): r for r in readers}.values():
            for index, operand in enumerate(reader.inputs):
                if operand is output:
                    reader.inputs[index] = constant
        report.did(output.name)
    graph.cleanup()
    return report


def _foldable(graph: Graph, report: PassReport) -> list[Node]:
    """Nodes all of whose inputs are constants or outputs of such nodes, in order."""
    known: set[int] = set()
    found = []
    for node in graph.nodes:
        computed = [t for t in node.inputs if not is_constant(t) and not t.is_empty()]
        if node.op in _NOT_REPEATABLE or not all(id(t) in known for t in computed) or _is_weight_transpose(node):
            continue
        size = sum(prod(o.shape) * 4 for o in node.outputs if o.shape)
        if size > LIMIT_BYTES:
            report.skip(node.name, f"its {size / 2**20:.0f} MiB would be stored in the graph")
            continue
        known.update(id(o) for o in node.outputs)
        found.append(node)
    outputs = {id(o) for o in graph.gs.outputs}
    return [n for n in found if not any(id(o) in outputs for o in n.outputs)]


def _is_weight_transpose(node: Node) -> bool:
    return node.op == "Transpose" and is_constant(node.inputs[0]) and len(node.inputs[0].shape) == 2


def _evaluate(graph: Graph, names: list[str]) -> dict[str, Array]:
    """Values of constant-only `names`, computed in a copy of the graph that has nothing else."""
    part = graph.copy()
    values = part.values()
    part.gs.inputs, part.gs.outputs = [], [values[name] for name in names]
    part.gs.cleanup().toposort()
    return ort.run(part, {})
