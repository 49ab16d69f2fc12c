"""trace: what torch's exporter writes and no runtime takes is replaced."""

from __future__ import annotations

import torch

from vdq_export.model import Model
from vdq_export.trace import trace


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
