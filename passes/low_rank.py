"""Take the planned low-rank branches out of the weights and run them beside, in float.

Legend: M rows, K input channels, N output channels, r_i rank of layer i, R = Σ r_i over the layers that read x.

    Add(MatMul(x, W_i[K, N_i]), b_i)
      ->  Gemm(Slice(Gemm(x, [D_1 D_2 …][K, R]))_i, U_i[r_i, N_i], C = Add(MatMul(x, W_i − D_i·U_i), b_i))

Exact: x·W = x·(W − D·U) + (x·D)·U. The branch reads x itself, so what quantizes the main product's input later does
not touch it. Layers that read one value share one down projection, and a Gemm adds the main result without another
pass over it. The branch is made of Gemm, the model's linears are MatMul: nothing takes it for one of them. The sum
carries the name of the layer's output. The difference is computed when the weight is read. Layers kept in float have no
branch.
"""

from __future__ import annotations

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, Linear, Value, transform_lazily
from vdq_export.plan import LayerPlan, tensor_name

NAME = "low_rank"
AFTER = ("linear", "smoothing", "rotation")

_Member = tuple[Linear, Array, Array]  # down [K, r], up [r, N]


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    if context.plan is None:
        return report
    linears = {linear.name: linear for linear in graph.linears()}
    done = {node.name for node in graph.nodes}
    groups: dict[int, list[_Member]] = {}
    for layer in context.plan.layers:
        if layer.low_rank is None or f"{layer.name}/LowRank.up" in done:
            continue
        if layer.name not in linears:
            raise PlanError(f"the plan gives {layer.name} a low-rank branch, which the graph does not have")
        linear = linears[layer.name]
        groups.setdefault(id(linear.value), []).append((linear, *_factors(layer, linear, context)))
    for members in groups.values():
        _branch(graph, members)
        report.did(_cost(members))
    graph.cleanup()
    return report


def _factors(layer: LayerPlan, linear: Linear, context: PassContext) -> tuple[Array, Array]:
    assert layer.low_rank is not None
    (k, n), rank = linear.shape, layer.low_rank.rank
    found = []
    for what, shape in (("down", (k, rank)), ("up", (rank, n))):
        name = tensor_name(layer.name, what)  # type: ignore[arg-type]
        if name not in context.tensors or context.tensors[name].shape != shape:
            raise PlanError(f"layer {layer.name}: {name} {shape} is not among the plan's tensors")
        found.append(np.asarray(context.tensors[name], np.float32))
    return found[0], found[1]


def _branch(graph: Graph, members: list[_Member]) -> None:
    first = members[0][0]
    value = first.matmul.inputs[0]  # not first.value: the linear before may have got a branch since
    rows, k = first.rows, first.shape[0]
    path, widths = first.name, [down.shape[1] for _, down, _ in members]
    flat = value if len(value.shape) == 2 else _reshape(graph, value, [rows, k], f"{path}/LowRank.rows")
    together = members[0][1] if len(members) == 1 else np.concatenate([down for _, down, _ in members], axis=1)
    operands = [flat, graph.constant(f"{path}.low_rank.down", together)]
    shape = [rows, sum(widths)]
    low = graph.add_node("Gemm", operands, f"{path}/LowRank.down", dtype=np.float32, shape=shape)
    start = 0
    for (linear, down, up), width in zip(members, widths, strict=True):
        own = low if len(members) == 1 else _columns(graph, low, start, width, f"{linear.name}/LowRank.columns")
        start += width
        _add(graph, linear, own, up)
        _subtract(graph, linear, down, up)


def _add(graph: Graph, linear: Linear, low: Value, up: Array) -> None:
    """Let the readers of the linear's output read output + low[M, r] · up[r, N], under its name."""
    output, path, rows, n = linear.output, linear.name, linear.rows, linear.shape[1]
    readers = list(output.outputs)
    main = output if len(output.shape) == 2 else _reshape(graph, output, [rows, n], f"{path}/LowRank.main")
    operands = [low, graph.constant(f"{path}.low_rank.up", up), main]
    result = graph.add_node("Gemm", operands, f"{path}/LowRank.up", dtype=np.float32, shape=[rows, n])
    if len(output.shape) != 2:
        result = _reshape(graph, result, list(output.shape), f"{path}/LowRank.sum")
    mine = [node for node in output.outputs if not any(node is reader for reader in readers)]
    name = output.name
    graph.replace_uses(output, result, keep=mine)
    output.name, result.name = graph.fresh(f"{name}/main"), name


def _subtract(graph: Graph, linear: Linear, down: Array, up: Array) -> None:
    weight = linear.weight
    if len(weight.outputs) > 1:  # other readers keep it whole
        values = linear.read_weight() - down @ up
        linear.matmul.inputs[1] = graph.constant(graph.fresh(f"{weight.name}.residual"), values)
        return
    transform_lazily(weight, lambda values: values - down @ up)
    weight.name = graph.fresh(f"{weight.name}.residual")


def _columns(graph: Graph, low: Value, start: int, width: int, name: str) -> Value:
    bounds = [
        graph.constant(graph.fresh(f"{name}.{what}"), np.array([entry], np.int64))
        for what, entry in (("start", start), ("end", start + width), ("axis", 1))
    ]
    return graph.add_node("Slice", [low, *bounds], name, dtype=np.float32, shape=[low.shape[0], width])


def _reshape(graph: Graph, value: Value, shape: list[int], name: str) -> Value:
    target = graph.constant(graph.fresh(f"{name}.shape"), np.array(shape, np.int64))
    return graph.add_node("Reshape", [value, target], name, dtype=np.float32, shape=shape)


def _cost(members: list[_Member]) -> str:
    """Who shares a down projection, with which ranks, and the branch's multiply-adds a run against the main ones."""
    rows, k = members[0][0].rows, members[0][0].shape[0]
    branch = rows * sum(k * down.shape[1] + up.size for _, down, up in members)
    main = rows * sum(k * linear.shape[1] for linear, _, _ in members)
    names = ", ".join(f"{linear.name} (rank {down.shape[1]})" for linear, down, _ in members)
    return f"{names}: {branch} multiply-adds a run beside {main} ({branch / main:.1%})"
