"""A network of one's own with a loop of its own: the order of its arguments, its steps, its clips, its last layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vdq_export
from vdq_export.errors import BundleError
from vdq_export.manifest import Signature
from vdq_export.model import Model, Step


class Guided(nn.Module):
    """Two inputs of one number each; `mask` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, mask: Any = None, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert guidance is not None and mask is None
        hidden = torch.nn.functional.silu(self.first(x) * (1 + timestep / 1000) + guidance)
        made: torch.Tensor = self.last(hidden + self.middle(hidden))
        return made


def step(t: float, **changed: Any) -> Step:
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(int(t)))
    inputs = {"guidance": torch.tensor([0.5]), "x": x, "timestep": torch.tensor([t]), **changed}
    return {"t": t, "branch": "cond", "inputs": inputs}


def guided(steps: Any = None, **settings: Any) -> Model:
    torch.manual_seed(0)
    trajectories = [[step(t) for t in (900.0, 500.0, 100.0)]] if steps is None else steps
    return Model(Guided(), step(500.0)["inputs"], trajectories, name="guided", **settings)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "bundle"
    vdq_export.export(guided(), target="ort-int8", tsw=1, recipe="static-minmax", out=out, page=False)
    return out


def test_positional_arguments_are_those_of_forward(bundle: Path) -> None:
    """The example names guidance first; forward() has it last, behind an argument that no graph has."""
    call = step(100.0)["inputs"]
    with vdq_export.load(bundle) as network:
        named = network(**call)
        assert torch.equal(network(call["x"], call["timestep"], None, call["guidance"]), named)
        with pytest.raises(BundleError, match="'x' was given twice"):
            network(call["x"], **call)
        with pytest.raises(BundleError, match="with 5 inputs, the module takes x, timestep, mask, guidance"):
            network(*call.values(), None, None)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda x, timestep, mask, guidance: 0, ("x", "timestep", "mask", "guidance")),
        (lambda guidance, x, timestep, mask: 0, ()),
        (lambda **anything: 0, ()),
        (lambda x, **others: 0, ("x", "guidance", "timestep")),
    ],
)
def test_order_of_arguments(forward: Callable[..., Any], expected: tuple[str, ...]) -> None:
    from tests.tiny_bundle import graph
    from vdq_export.bundle_writer import signature_of

    model = guided()
    model.module.forward = forward  # type: ignore[method-assign]
    proto, _ = graph(1.0)
    for value, name in zip(proto.graph.input, ("guidance", "x", "timestep"), strict=True):
        value.name = name
    signature: Signature = signature_of(proto, "timestep", arguments=model.arguments())
    assert signature.positional == expected
