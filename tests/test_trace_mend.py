"""trace: what torch's exporter writes and no runtime takes is replaced."""

from __future__ import annotations

import pytest
import torch

from vdq_export.errors import TraceError
from vdq_export.model import Model
from vdq_export.trace import trace
from vdq_export.tracing.weightless import trace_weightless


class Net(torch.nn.Module):
    """Squeezes an axis that is not 1 long, and fills a boolean mask: both run in torch."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        late = torch.arange(6) >= timestep.to(torch.int64)
        keep = torch.ones(6, dtype=torch.bool).masked_fill(late, False)
        return torch.where(keep, x.squeeze(1) * 2, x)


def test_squeeze_of_a_long_axis_and_where_of_booleans() -> None:
    inputs = {"x": torch.randn(2, 6), "timestep": torch.tensor([4.0])}
    model = Model(Net(), inputs, [[{"t": 4.0, "branch": "cond", "inputs": inputs}]], name="net")
    ops = {node.op for node in trace(model).nodes}  # which compares graph and module
    assert "Squeeze" not in ops
    assert {"And", "Or", "Not"} <= ops


class Orthogonal(torch.nn.Module):
    """The basis of a weight's columns, and a table of complex numbers that is split before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
        angles = torch.linspace(0, 1, 6)
        self.register_buffer("table", torch.polar(torch.ones(6), angles), persistent=False)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        basis = torch.linalg.qr(self.weight + 1e-8)[0]
        first, last = self.table.split([2, 4])
        turned = torch.view_as_complex((x @ basis).reshape(2, 2, 2)) * last.reshape(2, 2)
        return torch.view_as_real(turned).flatten(1) * timestep + first.real.sum()


def test_what_onnx_has_no_operator_for_is_computed_where_it_depends_on_no_input() -> None:
    inputs = {"x": torch.randn(2, 6), "timestep": torch.tensor([4.0])}
    graph = trace(Model(Orthogonal(), inputs, [], name="orthogonal"))  # which compares graph and module
    assert {node.op for node in graph.nodes} >= {"MatMul", "Mul"}


def test_what_needs_weights_cannot_be_traced_without_them() -> None:
    inputs = {"x": torch.randn(2, 6), "timestep": torch.tensor([4.0])}
    with pytest.raises(TraceError, match="depends on weights; load them and use trace"):
        trace_weightless(Orthogonal, inputs)
