"""Layers of one module are told apart: a Linear that is called twice, products of parts of one parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vdq_export import export, load
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.pipeline import CANONICAL, run_passes
from vdq_export.trace import trace

TIMESTEPS = (900.0, 500.0, 100.0)


class Twice(torch.nn.Module):
    """One Linear called twice on inputs of different size, and torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Linear(32, 32)
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        first = self.mix(hidden_states * 10)
        second = self.mix(torch.nn.functional.gelu(first) / 30)
        mixed, _ = self.attention(second, second, second, need_weights=False)
        return hidden_states + mixed + timestep[:, None, None] / 1000


@pytest.fixture(scope="module")
def model() -> Model:
    def step(t: float, seed: int) -> dict[str, Any]:
        x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(seed))
        return {"t": t, "branch": "cond", "inputs": {"hidden_states": x, "timestep": torch.tensor([t])}}

    steps = [step(t, seed) for seed, t in enumerate(TIMESTEPS)]
    return Model(Twice().eval(), steps[0]["inputs"], [steps], name="twice")


@pytest.fixture(scope="module")
def graph(model: Model) -> Graph:
    made = trace(model)
    run_passes(made, CANONICAL, PassContext())
    return made


def test_names_are_told_apart_and_weights_are_their_own(graph: Graph) -> None:
    linears = graph.linears()
    names = [one.name for one in linears]
    assert len(set(names)) == len(names) and {"mix", "mix.1"} <= set(names)
    assert len({id(one.weight) for one in linears}) == len(linears)
    before = graph.to_proto().SerializeToString(deterministic=True)
    run_passes(graph, ("fold_constants", "linear"), PassContext())
    assert graph.to_proto().SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("recipe", ["static-asq", "svdquant"])
def test_such_a_network_is_exported(model: Model, tmp_path: Path, recipe: str) -> None:
    """8 bits keep 30 dB with room, 4 bits with a float branch 12; the two calls differ 300-fold in size."""
    bundle = export(model, target="reference", tsw=1, recipe=recipe, out=tmp_path / "bundle", workers=1)
    quantized = [layer.name for layer in bundle.plans[0].layers if layer.quantized]
    assert {"mix", "mix.1"} <= set(quantized)
    with load(bundle.path) as transformer:
        for step in next(iter(model.iter_trajectories())):
            found = transformer(**step["inputs"])
            assert sqnr_db(model(**step["inputs"]).numpy(), found.numpy()) > (30.0 if recipe == "static-asq" else 12.0)
