"""Trace: names people recognise, a graph that equals the module, and one clear line for what cannot be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from tests import tiny_model
from vdq_export import ort, pipeline
from vdq_export.contract import PassContext
from vdq_export.errors import ModelError, TraceError
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.trace import float_error, trace
from vdq_export.tracing import exporter

TOLERANCE = 1e-4  # of the largest output; float32 reorders sums, which costs about 1e-6 at these widths


class PlainBlock(nn.Module):
    """Pre-norm attention and a GELU FFN with AdaLN, in plain torch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width + 3)
        self.down = nn.Linear(2 * width + 3, width)
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(emb).unsqueeze(1).chunk(2, dim=-1)
        h = self.norm1(x) * (1 + scale) + shift
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, dim=-1))
        h = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(h)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PlainDiT(nn.Module):
    """A DiT nobody has heard of. `wrap` shapes what forward returns; shared weights, a buffer, an unused parameter."""

    def __init__(self, width: int = 30, heads: int = 5, wrap: Callable[[torch.Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.wrap = wrap
        self.embed = nn.Linear(7, width)
        self.time = nn.Linear(10, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(2))
        self.head = nn.Linear(width, 7)
        self.register_buffer("frequencies", torch.linspace(0.1, 3.0, 5), persistent=True)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> Any:
        angles = t[:, None] / 1000 * self.frequencies
        emb = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.embed(latents)
        for block in self.blocks:
            x = block(x, nn.functional.silu(emb))
        return self.wrap(self.head(x))


def plain(**settings: Any) -> Model:
    torch.manual_seed(3)
    network = PlainDiT(**settings)
    example = {"latents": torch.randn(1, 11, 7), "t": torch.tensor([640.0])}
    return Model(network, example, [], name="plain", timestep_input="t")


def constants(graph: Graph) -> dict[str, Array]:
    return {c.name: np.asarray(c.values) for c in graph.constants()}


@pytest.fixture(scope="module")
def plain_graph() -> Graph:
    return trace(plain())


# -- equality --------------------------------------------------------------------------------------------------------


def test_graph_equals_the_module_on_inputs_it_was_not_traced_with(
    traced: Graph, tiny: Model, tiny_feeds: Mapping[str, Array]
) -> None:
    expected = tiny(**{name: torch.from_numpy(array.copy()) for name, array in tiny_feeds.items()}).numpy()
    actual = ort.run(traced, dict(tiny_feeds))["sample"]
    assert actual.shape == expected.shape == tiny_model.LATENT
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("layer", ["blocks.0.attn1.to_q.bias", "blocks.1.ffn.net.2.weight", "scale_shift_table"])
def test_one_wrong_weight_is_seen(traced: Graph, tiny: Model, layer: str) -> None:
    """The comparison has teeth: half a weight's standard deviation in one channel of one tensor is far above 1e-4."""
    wrong = traced.copy()
    constant = wrong.values()[layer]
    values = np.array(constant.values)
    values[..., 3] += 0.5 * values.std()
    constant.values = values
    assert float_error(traced, tiny) <= TOLERANCE / 10
    assert float_error(wrong, tiny) > TOLERANCE


def test_a_graph_that_differs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Graph:
        graph = honest(*args, **kwargs)
        weight = graph.values()["head.weight"]
        weight.values = np.asarray(weight.values) * np.float32(1.01)
        return graph

    honest = Graph.from_proto
    monkeypatch.setattr(exporter.Graph, "from_proto", staticmethod(broken))
    with pytest.raises(TraceError, match=r"plain: graph and module differ by .*e-0\d") as caught:
        trace(plain())
    assert "\n" not in str(caught.value)


# -- names -----------------------------------------------------------------------------------------------------------


def test_parameters_keep_their_names_and_bytes(traced: Graph, tiny: Model) -> None:
    found = constants(traced)
    for name, tensor in tiny.module.state_dict().items():
        assert name in found, f"{name} was renamed, merged or lost"
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


@pytest.mark.parametrize("which", ["traced", "plain_graph"])
def test_everything_is_named_by_where_it_comes_from(which: str, request: pytest.FixtureRequest) -> None:
    """Nodes and values: "<module path>/<Op>"; initializers: a parameter, a buffer, or "<node>.<operand>"."""
    graph: Graph = request.getfixturevalue(which)
    module = tiny_model.wan() if which == "traced" else plain().module
    modules = {name for name, _ in module.named_modules()}
    weights = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    nodes = {node.name for node in graph.nodes}
    for node in graph.nodes:
        path, _, op = node.name.rpartition("/")
        assert path in modules, node.name
        assert op.split("_")[0] == node.op.split("_")[0], node.name
        if not any(o is graph.gs.outputs[0] for o in node.outputs):
            assert node.outputs[0].name == node.name
    made = {name for name in constants(graph) if name not in weights}
    assert {name for name in made if name.rpartition(".")[0] not in nodes and not _first_reader_gone(name)} == set()
    assert all(constants(graph)[name].size < 10_000 for name in made)


def _first_reader_gone(name: str) -> bool:
    """cleanup() may drop the node a constant was named after; the form of the name remains."""
    node, _, operand = name.rpartition(".")
    return operand.split("_")[0].isdigit() and node.rpartition("/")[2][:1].isupper()


def test_after_the_canonical_passes_every_linear_is_named_after_its_module(traced: Graph, tiny: Model) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    expected = {name: module for name, module in tiny.module.named_modules() if isinstance(module, nn.Linear)}
    linears = {linear.name: linear for linear in graph.linears()}
    assert set(linears) == set(expected)
    for name, linear in linears.items():
        assert linear.shape == (expected[name].in_features, expected[name].out_features)
        weight = expected[name].weight.detach().numpy().T
        # A pass may reorder output channels (rotary does for q and k); it computes nothing.
        assert sorted(map(bytes, np.asarray(linear.weight.values).T.copy())) == sorted(map(bytes, weight.T.copy()))
        assert linear.weight.name.startswith(f"{name}.weight")
        assert linear.bias is not None and linear.bias.name.startswith(f"{name}.bias")
    assert {linear.rows for n, linear in linears.items() if ".attn1." in n} == {tiny_model.TOKENS}


def test_equal_weights_stay_apart() -> None:
    """Two layers that start out equal are two parameters; merged, a later pass on one would change the other."""
    model = plain()
    first, second = model.module.get_submodule("blocks.0.out"), model.module.get_submodule("blocks.1.out")
    second.load_state_dict(first.state_dict())
    found = constants(trace(model))
    assert {"blocks.0.out.weight", "blocks.1.out.weight", "blocks.0.out.bias", "blocks.1.out.bias"} <= set(found)


def test_graph_is_static_and_standard(traced: Graph) -> None:
    proto = traced.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    assert [entry.version for entry in proto.opset_import] == [exporter.OPSET]
    for value in traced.values().values():
        assert value.shape is not None and all(isinstance(d, int) for d in value.shape), value.name
    assert not any(node.op.startswith("Sequence") or node.op in ("If", "Loop") for node in traced.nodes)


def test_tracing_twice_gives_the_same_bytes(plain_graph: Graph) -> None:
    assert trace(plain()).hash() == plain_graph.hash()


def test_a_copy_is_the_same_graph(traced: Graph) -> None:
    copied = traced.copy()
    ours, theirs = (g.to_proto().SerializeToString(deterministic=True) for g in (traced, copied))
    assert ours == theirs
    assert copied.hash() == traced.hash()
    copied.add_node("Gelu", [copied.gs.inputs[0]], "x", dtype=np.float32, shape=None, domain="com.microsoft")
    copied.skeleton()
    assert [entry.domain for entry in traced.skeleton()[0].opset_import] == [""], "a copy's domains are its own"
    copied = traced.copy()
    copied.gs.producer_version = "another torch"
    assert copied.hash() == traced.hash()


def test_weights_are_views_of_the_modules_own(traced: Graph, tiny: Model) -> None:
    weight = traced.values()["blocks.0.ffn.net.2.weight"].values
    assert np.shares_memory(weight, tiny.module.get_parameter("blocks.0.ffn.net.2.weight").detach().numpy())


# -- what a module may return, and what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [lambda y: (y,), lambda y: [y, y + 1], lambda y: {"sample": y}, lambda y: ({"sample": y}, 3)],
    ids=["tuple", "list", "dict", "nested"],
)
def test_module_may_return(wrap: Callable[[torch.Tensor], Any], plain_graph: Graph) -> None:
    """`plain_graph` is the same network returning a bare tensor; what it is wrapped in leaves no trace."""
    assert float_error(trace(plain(wrap=wrap)), plain()) <= TOLERANCE / 10


def test_module_that_returns_no_tensor_is_one_line() -> None:
    with pytest.raises((TraceError, ModelError), match="returned") as caught:
        trace(plain(wrap=lambda y: "text"))
    assert "\n" not in str(caught.value)


class DependsOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        if latents.sum() > 0:
            return self.linear(latents)
        return latents[latents > 0]


class Noisy(DependsOnData):
    def forward(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.linear(latents) + torch.rand_like(latents)


@pytest.mark.parametrize("kind", [DependsOnData, Noisy])
def test_what_depends_on_data_or_chance_is_refused_in_one_line(kind: type[nn.Module]) -> None:
    model = Model(kind(), dict(plain().example_inputs), [], name="strange", timestep_input="t")
    with pytest.raises(TraceError, match="strange") as caught:
        trace(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    network = PlainDiT()
    with torch.no_grad():
        network.get_parameter("blocks.1.down.weight")[2, 1] = value
    with pytest.raises(ModelError, match=r"blocks\.1\.down\.weight .* NaN or Inf"):
        Model(network, dict(plain().example_inputs), [], timestep_input="t")


def test_an_input_that_is_no_tensor_is_named() -> None:
    with pytest.raises(ModelError, match="latents"):
        Model(PlainDiT(), {"latents": np.zeros(3), "t": torch.ones(1)}, [], timestep_input="t")  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"timestep.*latents, t"):
        Model(PlainDiT(), dict(plain().example_inputs), [])
