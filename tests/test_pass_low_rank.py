"""The low-rank pass: exact in onnxruntime, one down projection a value, and nothing that takes the branch for a linear.

Tolerance: 1e-5 of the largest output. x·W is summed in two parts, each with roundings of about 1e-7 · sqrt(K) of it,
3e-6 at K = 768; a branch with a wrong factor leaves 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from msgspec.structs import replace

from tests.smoothing_cases import EXACT, TOKENS, WIDTHS, Net, attention_net, error, made_plan
from vdq_export import ort, pipeline
from vdq_export.calib.low_rank import split
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PlanError
from vdq_export.graph import Array, Graph, is_promise
from vdq_export.passes import low_rank
from vdq_export.plan import LayerPlan, LowRank, QuantPlan, Range, WeightPlan, tensor_name

Tensors = dict[str, Array]


def planned(graph: Graph, rank: Callable[[str], int] | int = 3) -> tuple[QuantPlan, Tensors]:
    """Each layer's rank, and the best branch of its weight. 8-bit grids, so that the other passes can run too."""
    layers, tensors = [], Tensors()
    for linear in graph.linears():
        (k, n), wanted = linear.shape, rank if isinstance(rank, int) else rank(linear.name)
        weight = linear.read_weight()
        branch = split(weight, wanted) if wanted else None
        left = weight if branch is None else weight - branch.down @ branch.up
        if branch is not None:
            tensors[tensor_name(linear.name, "down")] = branch.down
            tensors[tensor_name(linear.name, "up")] = branch.up
        scale = tuple((np.maximum(np.abs(left).max(axis=0), 1e-6) / 127).tolist())
        layers.append(
            LayerPlan(
                name=linear.name,
                value=linear.value.name,
                rows=linear.rows,
                shape=(k, n),
                low_rank=None if branch is None else LowRank(rank=branch.down.shape[1], error=branch.error, why="test"),
                weight=WeightPlan(dtype="int8", qmax=127, scale=scale, why="test"),
                activation=(Range(lo=-6, hi=6, scale=12 / 255, zero_point=128, why="test"),),
            )
        )
    return made_plan(layers), tensors


def branched(graph: Graph, plan: QuantPlan, tensors: Tensors) -> tuple[Graph, PassReport]:
    """A copy with branches; the original is untouched, and the layers and their outputs keep their names."""
    kept, after = graph.hash(), graph.copy()
    report = low_rank.run(after, PassContext(plan=plan, tensors=tensors))
    after.check()
    assert graph.hash() == kept
    assert [x.matmul.name for x in after.linears()] == [x.matmul.name for x in graph.linears()]
    return after, report


def run_all(before: Graph, after: Graph) -> float:
    """As error(), over the outputs of all linears by name too: what verify compares."""
    random = np.random.default_rng(5)
    feeds = {v.name: random.normal(size=v.shape).astype(np.float32) for v in before.gs.inputs}
    names = [linear.output.name for linear in before.linears()]
    a, b = (ort.run(graph, feeds, names, threads=1) for graph in (before, after))
    assert a.keys() == b.keys()
    return max(float(np.abs(a[k] - b[k]).max() / np.abs(a[k]).max()) for k in a)


def shared_net(width: int, bias: bool = True) -> Graph:
    """q, k and v read one value; out reads what they make, next reads out's output directly and is a graph output."""
    net = Net(width)
    q, k, v = (net.linear("x", name, bias=bias) for name in ("q", "k", "v"))
    y = net.op("Add", net.op("Mul", q, k, name="Mul"), v, name="sum/Add")
    return net.graph(net.linear(net.linear(y, "out", n=2 * width + 1, bias=bias), "next", k=2 * width + 1, n=3))


def nodes(graph: Graph, ending: str) -> list[str]:
    return [node.name for node in graph.nodes if node.name.endswith(ending)]


@pytest.mark.parametrize("width", [*WIDTHS, 768])
@pytest.mark.parametrize("bias", [True, False])
def test_exact_on_all_widths(width: int, bias: bool) -> None:
    graph = shared_net(width, bias)
    after, report = branched(graph, *planned(graph))
    assert report.applied == 3
    assert run_all(graph, after) <= EXACT
    assert nodes(after, "/LowRank.down") == ["q/LowRank.down", "out/LowRank.down", "next/LowRank.down"]
    assert len(nodes(after, "/LowRank.up")) == 5
    shares = report.details[0]
    rank = min(3, width)
    branch, main = TOKENS * 6 * width * rank, TOKENS * 3 * width * width
    assert shares.startswith(f"q (rank {rank}), k (rank {rank}), v (rank {rank}): {branch} multiply-adds a run")
    assert shares.endswith(f"beside {main} ({branch / main:.1%})")


@pytest.mark.parametrize("fault", ["rank slice", "sign of the residual", "swapped up", "swapped columns", "no branch"])
def test_wrong_branches_are_caught(fault: str) -> None:
    """What the tolerance above is worth: one wrong factor or slice, and the outputs differ."""
    graph = shared_net(12)
    plan, tensors = planned(graph)
    if fault == "rank slice":  # singular directions 1 … 3 subtracted, 2 … 4 added back
        after, _ = branched(graph, plan, tensors)
        found = split(next(x for x in graph.linears() if x.name == "q").read_weight(), 4)
        after.values()["q.low_rank.up"].values = np.ascontiguousarray(found.up[1:])
    else:
        after, _ = branched(graph, plan, tensors)
        constants = after.values()
        up, weight = constants["q.low_rank.up"], constants["q.weight.residual"]
        down, whole = tensors["q#down"], graph.values()["q.weight"].values
        if fault == "sign of the residual":
            weight.values = whole + down @ tensors["q#up"]
        elif fault == "swapped up":
            up.values, constants["k.low_rank.up"].values = constants["k.low_rank.up"].values, up.values
        elif fault == "swapped columns":
            constants["q/LowRank.columns.start"].values = np.array([3])
            constants["q/LowRank.columns.end"].values = np.array([6])
        else:
            up.values = np.zeros_like(up.values)
    assert run_all(graph, after) > 1000 * EXACT


def test_ranks_may_differ_and_layers_may_have_none() -> None:
    graph = shared_net(13)
    after, report = branched(graph, *planned(graph, lambda name: {"q": 5, "v": 1}.get(name, 0)))
    assert report.applied == 1
    assert run_all(graph, after) <= EXACT
    assert list(after.values()["q.low_rank.down"].shape) == [13, 6]
    assert next(x for x in after.linears() if x.name == "k").weight.name == "k.weight"


def test_values_of_rank_2_need_no_reshape() -> None:
    net = Net(7)
    net.inputs["x"] = [TOKENS, 7]
    graph = net.graph(net.linear("x", "a"), net.linear("x", "b", bias=False))
    after, _ = branched(graph, *planned(graph))
    assert not [n for n in after.nodes if n.op == "Reshape"]
    assert run_all(graph, after) <= EXACT


def test_a_weight_that_others_read_stays_whole_for_them() -> None:
    net = Net(8)
    first = net.linear("x", "a", bias=False)
    tied = net.op("MatMul", first, "a.weight", name="b/MatMul")
    graph = net.graph(tied, net.op("ReduceSum", "a.weight", name="total", keepdims=0))
    after, _ = branched(graph, *planned(graph, lambda name: 3 * (name == "a")))
    assert run_all(graph, after) <= EXACT
    assert next(x for x in after.linears() if x.name == "b").weight.name == "a.weight"


def test_after_attention_and_on_a_graph_output() -> None:
    graph = attention_net(12, 3)
    after, _ = branched(graph, *planned(graph))
    assert [o.name for o in after.gs.outputs] == [o.name for o in graph.gs.outputs]
    assert error(graph, after) <= EXACT


def test_second_run_changes_nothing() -> None:
    graph = shared_net(12)
    plan, tensors = planned(graph)
    after, _ = branched(graph, plan, tensors)
    once = after.hash()
    again = low_rank.run(after, PassContext(plan=plan, tensors=tensors))
    assert (again.applied, after.hash()) == (0, once)


def test_residuals_are_promises() -> None:
    """Read one at a time by quantize_weights; done at once they would double the model in memory."""
    graph = shared_net(12)
    after, _ = branched(graph, *planned(graph))
    for linear in after.linears():
        assert is_promise(linear.weight)


def test_plan_that_does_not_fit_is_refused() -> None:
    graph = shared_net(7)
    plan, tensors = planned(graph)
    with pytest.raises(PlanError, match=r"layer v: v#up \(3, 7\) is not among the plan's tensors"):
        branched(graph, plan, {name: array for name, array in tensors.items() if name != "v#up"})
    with pytest.raises(PlanError, match=r"layer k: k#down \(7, 3\) is not"):
        branched(graph, plan, {**tensors, "k#down": tensors["k#down"][:, :2]})
    absent = replace(plan.layers[0], name="elsewhere")
    with pytest.raises(PlanError, match="elsewhere a low-rank branch, which the graph does not have"):
        branched(graph, made_plan([absent]), tensors)


# -- with the passes behind it ---------------------------------------------------------------------------------------


def test_quantized_main_and_float_branch_are_the_definition() -> None:
    """y = Q(x)·ŵ + b + (x·D)·U in numpy. One step of x̂ is 12/255; what is left are float32 sums and a bias on the
    accumulator's grid (12/255 · scale, half a step of it), 1e-4 of the outputs: a branch that read x̂ instead of x, or
    a main product of the whole weight, is off by the size of a step."""
    net = Net(24)
    graph = net.graph(net.linear("x", "a"), net.linear("x", "b", n=40))
    plan, tensors = planned(graph, 4)
    after = graph.copy()
    context = PassContext(plan, plan.bins[0], None, tensors)
    pipeline.run_passes(after, ("low_rank", "quantize_weights", "qdq"), context)
    x = np.random.default_rng(0).normal(size=(1, TOKENS, 24)).astype(np.float32)
    got = ort.run(after, {"x": x}, threads=1)
    rounded = np.clip(np.rint(x / np.float32(12 / 255)), -128, 127) * np.float32(12 / 255)
    for linear, layer in zip(graph.linears(), plan.layers, strict=True):
        assert layer.weight is not None and linear.bias is not None
        down, up = (tensors[tensor_name(linear.name, what)] for what in ("down", "up"))  # type: ignore[arg-type]
        scale = np.array(layer.weight.scale, np.float32)
        residual = np.clip(np.rint((linear.read_weight() - down @ up) / scale), -127, 127) * scale
        wanted = rounded @ residual + linear.bias.values + x @ down @ up
        difference = np.abs(got[linear.output.name] - wanted).max() / np.abs(wanted).max()
        assert difference <= 1e-3
        assert np.abs(rounded @ (residual + down @ up) + linear.bias.values - wanted).max() > 1e-2
    assert [n.op for n in after.nodes if n.name.endswith(("LowRank.down", "LowRank.up"))] == ["Gemm"] * 3
    assert not [x for x in after.linears() if "LowRank" in x.matmul.name]


def test_on_a_traced_transformer(traced: Graph, tiny_feeds: Mapping[str, Array]) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    after, report = branched(graph, *planned(graph, 4))
    assert report.applied >= 8
    assert error(graph, after, tiny_feeds) <= EXACT
