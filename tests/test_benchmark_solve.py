"""The benchmark of solving still has every layer to solve: a rule that kept them in float left nothing to time."""

from __future__ import annotations

from benchmarks import solve_speed


def test_every_linear_is_quantized_in_every_bin() -> None:
    found, seconds = solve_speed.solved(solve_speed.made(solve_speed.SHAPES[True]), 1)
    assert len(found.plan.layers) == 10 and all(layer.quantized for layer in found.plan.layers)
    assert seconds["solve"] > 0
