"""Tracing without weights gives, once they are bound, the graph that trace() makes of the loaded network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from tests import families, tiny_model
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.errors import ModelError, PassError, TraceError
from vdq_export.graph import Array, Graph, bind, is_unbound
from vdq_export.model import Model
from vdq_export.trace import trace
from vdq_export.tracing.weightless import trace_weightless


def constructor(module: Any) -> Callable[[], nn.Module]:
    """What builds `module`'s class from its configuration, with arguments fixed as they are in `module`."""

    def make() -> nn.Module:
        made: Any = type(module).from_config(dict(module.config))
        if isinstance(module.forward, partial):
            made.forward = partial(made.forward, **module.forward.keywords)
        network: nn.Module = made
        return network

    return make


def weights(model: Model) -> dict[str, Array]:
    return {name: parameter.detach().numpy() for name, parameter in model.module.named_parameters()}


def canonical(graph: Graph) -> Graph:
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    return graph


@pytest.fixture(scope="module")
def weightless(tiny: Model) -> Graph:
    return trace_weightless(constructor(tiny.module), tiny.example_inputs)


# -- equality with trace() -------------------------------------------------------------------------------------------


def test_bound_it_is_the_traced_graph(weightless: Graph, traced: Graph, tiny: Model) -> None:
    graph = weightless.copy()
    bind(graph, weights(tiny), source=traced.source)
    assert (graph.hash(), graph.source) == (traced.hash(), traced.source)
    assert canonical(graph).hash() == canonical(traced.copy()).hash()


def test_passes_may_run_before_the_weights_are_there(weightless: Graph, traced: Graph, tiny: Model) -> None:
    """What is computed of weights alone waits: one more fold_constants makes it."""
    graph = canonical(weightless.copy())
    assert {linear.name for linear in graph.linears()} == {linear.name for linear in canonical(traced.copy()).linears()}
    bind(graph, weights(tiny))
    pipeline.run_passes(graph, ("fold_constants",), PassContext())
    assert graph.hash() == canonical(traced.copy()).hash()


@pytest.mark.parametrize("family", ["CogVideoX-rotary", "HunyuanVideo"])
def test_other_families(family: str) -> None:
    """Tables given from outside; a boolean mask, and a constant computed of weights (the fixed guidance)."""
    model = families.FAMILIES[family]()
    loaded = trace(model)
    graph = trace_weightless(constructor(model.module), model.example_inputs)
    bind(graph, weights(model))
    assert graph.hash() == loaded.hash()
    assert canonical(graph).hash() == canonical(loaded).hash()


def test_two_weights_exchanged_are_seen(weightless: Graph, traced: Graph, tiny: Model) -> None:
    """The comparison has teeth: to_k and to_v have the same shape."""
    swapped = weights(tiny)
    first, second = "blocks.1.attn1.to_k.weight", "blocks.1.attn1.to_v.weight"
    swapped[first], swapped[second] = swapped[second], swapped[first]
    graph = weightless.copy()
    bind(graph, swapped)
    assert graph.hash() != traced.hash()


# -- before and while binding ----------------------------------------------------------------------------------------


def test_before_binding_there_are_names_shapes_and_types_only(weightless: Graph, tiny: Model) -> None:
    constants = {constant.name: constant for constant in weightless.constants()}
    for name, parameter in tiny.module.named_parameters():
        assert is_unbound(constants[name]), name
        assert (tuple(constants[name].shape), constants[name].dtype) == (tuple(parameter.shape), np.float32)
    assert not is_unbound(constants["rope.freqs_cos"]), "tables are real"
    proto, arrays = weightless.skeleton()
    assert not arrays.keys() & {name for name, _ in tiny.module.named_parameters()}
    assert {tensor.name for tensor in proto.graph.initializer} == constants.keys()
    with pytest.raises(PassError, match=r"without weights and proj_out\.bias is needed"):
        _ = constants["proj_out.bias"].values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("proj_out.bias"), r"no weight proj_out\.bias"),
        (lambda w: w.update({"proj_out.bias": np.zeros(5)}), r"proj_out\.bias is \(5,\), the model wants \(12,\)"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_do_not_fit_are_named(
    weightless: Graph, tiny: Model, change: Callable[[dict[str, Array]], Any], words: str
) -> None:
    graph, wrong = weightless.copy(), weights(tiny)
    change(wrong)
    with pytest.raises(ModelError, match=words):
        bind(graph, wrong)
    assert all(is_unbound(c) for c in graph.constants() if c.name in wrong), "left as it was"


def test_one_trace_serves_two_sets_of_weights(weightless: Graph, tiny: Model) -> None:
    """As of two experts: binding a copy leaves the other alone."""
    first, second = canonical(weightless.copy()), canonical(weightless.copy())
    bind(first, weights(tiny))
    bind(second, weights(tiny_model.other()))
    for graph, model in ((first, tiny), (second, tiny_model.other())):
        found = next(linear for linear in graph.linears() if linear.name == "blocks.0.ffn.net.2")
        np.testing.assert_array_equal(found.read_weight().T, weights(model)["blocks.0.ffn.net.2.weight"])


def test_bfloat16_weights_are_converted_when_they_are_read(weightless: Graph, tiny: Model) -> None:
    halved: Mapping[str, Array] = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights(tiny).items()}
    graph = weightless.copy()
    bind(graph, halved)
    rounded = weightless.copy()
    bind(rounded, {name: array.astype(np.float32) for name, array in halved.items()})
    assert graph.hash() == rounded.hash()


# -- any size, and what is refused -----------------------------------------------------------------------------------


class Huge(nn.Module):
    """40 GB of weights, and a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 100_000), persistent=False)
        self.linear = nn.Linear(100_000, 100_000, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.table)


def test_a_network_larger_than_memory() -> None:
    graph = canonical(trace_weightless(Huge, {"x": torch.ones(1, 3, 100_000)}))
    (linear,) = graph.linears()
    assert (linear.shape, linear.weight.name) == ((100_000, 100_000), "linear.weight.T")


class ReadsItsWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = self.linear.weight.abs().max().item()


class EmptyBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(3))


@pytest.mark.parametrize(("network", "words"), [(ReadsItsWeights, "cannot be built"), (EmptyBuffer, "buffer table")])
def test_what_needs_its_weights_is_refused_in_one_line(network: type[nn.Module], words: str) -> None:
    with pytest.raises(TraceError, match=rf"strange.*{words}") as caught:
        trace_weightless(network, {"x": torch.ones(1, 4)}, name="strange")
    assert "\n" not in str(caught.value)
