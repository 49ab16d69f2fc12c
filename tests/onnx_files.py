"""Networks as other people's .onnx files, with recorded trajectories beside them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vdq_export import recorded
from vdq_export.model import Step

WIDTH, TOKENS, TEXT = 32, 12, 5
TIMES = (900.0, 600.0, 300.0, 50.0)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)
        self.modulation = torch.nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(time)[:, None].chunk(2, -1)
        seen = self.norm(x) * (1 + scale) + shift
        both = torch.cat([seen, text], 1)
        weights = torch.softmax(self.q(seen) @ self.k(both).transpose(1, 2) / WIDTH**0.5, -1)
        x = x + self.o(weights @ self.v(both))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)), approximate="tanh"))


class Dit(torch.nn.Module):
    """A small diffusion transformer whose names are nobody's: x [B, tokens, 8], step [B], words [B, text, 16]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.words, self.leave = (
            torch.nn.Linear(8, WIDTH),
            torch.nn.Linear(16, WIDTH),
            torch.nn.Linear(WIDTH, 8),
        )
        self.time = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.SiLU(), torch.nn.Linear(WIDTH, WIDTH))
        self.layer = torch.nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: torch.Tensor, step: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        rate = torch.exp(-torch.arange(WIDTH // 2) / 4)
        angles = step[:, None] * rate
        time = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x, words = self.enter(x), self.words(words)
        for one in self.layer:
            x = one(x, words, time)
        return self.leave(x)


LINEARS = {"enter", "words", "leave", "time.0", "time.2"} | {
    f"layer.{i}.{name}" for i in range(2) for name in ("q", "k", "v", "o", "up", "down", "modulation")
}


def inputs(seed: int, t: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, TOKENS, 8, generator=generator),
        "step": torch.tensor([t]),
        "words": torch.randn(1, TEXT, 16, generator=generator),
    }


def record(folder: Path, count: int = 2, **changes: Any) -> Path:
    """Trajectories of the Dit's inputs; changes: tensors by name instead (None: left out)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        steps: list[Step] = []
        for index, t in enumerate(TIMES):
            given = inputs(10 * number + index, t) | changes
            given = {name: tensor for name, tensor in given.items() if tensor is not None}
            steps.append({"t": t, "branch": "cond", "inputs": given})
        recorded.save(steps, folder / f"{number}.safetensors")
    return folder


def export(path: Path, network: torch.nn.Module | None = None, **settings: Any) -> Path:
    """Written by plain torch.onnx.export."""
    given: Mapping[str, torch.Tensor] = inputs(0, 500.0)
    arguments = {"dynamo": False, "opset_version": 18} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            (network or Dit()).eval(), tuple(given.values()), str(path), input_names=list(given),
            output_names=["noise"], verbose=False, **arguments,
        )  # fmt: skip
    return path
