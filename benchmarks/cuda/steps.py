"""A whole step of a network: our program as one CUDA graph against torch.compile in bfloat16, and torchao where it is.

The float network is diffusers' own with random weights, compiled, on the fastest of torch's attention backends at this
shape. Both run one guidance branch. Ours does what a step does once the prompt's part has run ahead (docs/hoisting.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda import graphs
from benchmarks.cuda.timing import alternating, captured
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.program import Program

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
GOALS = {"w8a8": 1.25, "w8a8-attention": 1.8}
ROUNDS = 8
# The float network beside each kept graph: class, settings, inputs by name (masks are all ones), and (heads, tokens,
# channels) of its attention.
NETWORKS: dict[str, dict[str, Any]] = {
    "wan-1.3b": {
        "class": "WanTransformer3DModel",
        "settings": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "inputs": {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096)},
        "masks": {},
        "attention": (12, 32_760, 128),
    },
    "hunyuan-blocks": {
        "class": "HunyuanVideoTransformer3DModel",
        "settings": {"num_layers": 2, "num_single_layers": 2},
        "inputs": {
            "hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 256, 4096),
            "pooled_projections": (1, 768), "guidance": (1,),
        },
        "masks": {"encoder_attention_mask": (1, 256)},
        "attention": (24, 33_016, 128),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run a step. peak_bytes: what it allocates at most, its weights included, nothing else's."""

    run: Callable[[], object]
    weight_bytes: int
    peak_bytes: int


def measure(name: str, folder: Path, *, torchao: bool = True) -> list[dict[str, Any]]:
    """One row for each way to run network `name`: milliseconds, ratio to bfloat16, bytes of weights, peak bytes."""
    about = NETWORKS[name]
    backend, attention = best_attention(*about["attention"], masked=bool(about["masks"]))
    ways: dict[str, Way] = {}
    for way in ("bf16", *(("torchao fp8", "torchao int8") if torchao and find_spec("torchao") else ())):
        ways[way] = baseline(name, backend, way)
    for full in graphs.names():
        if full.startswith(f"{name}."):
            kind = full.removeprefix(f"{name}.")
            ways[kind] = program(full, folder / kind, backend)
    times = alternating({way: one.run for way, one in ways.items()}, ROUNDS)
    rows = []
    for way, one in ways.items():
        rows.append({
            "network": name, "way": way, "ms": times[way], "ratio": times["bf16"] / times[way],
            "goal": GOALS.get(way), "weight_bytes": one.weight_bytes, "peak_bytes": one.peak_bytes,
            "attention": f"{backend.name.lower()} {attention:.2f} ms" if way == "bf16" else "",
        })  # fmt: skip
    return rows


def program(name: str, folder: Path, backend: SDPBackend) -> Way:
    """The kept program on random inputs, captured; what attention it leaves to torch runs on `backend`."""
    before = torch.cuda.memory_allocated()
    made = lower(graphs.materialize(name, folder), device="cuda", dtype=torch.float16)
    feeds = inputs_of(made)
    torch.cuda.reset_peak_memory_stats()
    with on(backend):
        found = made.capture()(feeds)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise RuntimeError(f"{name} gives numbers that are not finite")
    return Way(lambda: made(feeds), made.weight_bytes, peak)


def inputs_of(program: Program) -> dict[str, torch.Tensor]:
    """Normal floats, masks of ones, the first bin."""
    random = torch.Generator(program.device).manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for one in program.inputs:
        if one.dtype.is_floating_point:
            made[one.name] = torch.randn(one.shape, generator=random, device=program.device).to(one.dtype)
        else:
            full = torch.ones if one.dtype == torch.bool else torch.zeros
            made[one.name] = full(one.shape, dtype=one.dtype, device=program.device)
    return made


def on(backend: SDPBackend) -> AbstractContextManager[None]:
    """torch's attention runs on `backend`, shapes that it cannot take on another."""
    others = [one for one in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH) if one != backend]
    chosen: AbstractContextManager[None] = sdpa_kernel([backend, *others], set_priority=True)
    return chosen


def best_attention(heads: int, tokens: int, channels: int, *, masked: bool = False) -> tuple[SDPBackend, float]:
    """(torch's fastest backend at this shape in bfloat16, milliseconds); masked: with a mask over the keys, all true"""
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool, device="cuda") if masked else None
    q, k, v = (torch.randn(1, heads, tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    runs: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask)

        try:
            run()
        except RuntimeError:  # not in this build, or not for this shape
            continue
        runs[backend.name] = captured(run)
    times = alternating(runs, ROUNDS)
    best = min(times, key=lambda name: times[name])
    return SDPBackend[best], times[best]


def baseline(name: str, backend: SDPBackend, way: str) -> Way:
    """The compiled float network on random inputs; way: "bf16", or torchao's quantization."""
    about, before = NETWORKS[name], torch.cuda.memory_allocated()
    with torch.device("cuda"):
        torch.manual_seed(0)
        network = getattr(diffusers, about["class"])(**about["settings"]).bfloat16().eval().requires_grad_(False)
        inputs = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in about["inputs"].items()}
        inputs |= {key: torch.ones(shape, dtype=torch.int64) for key, shape in about["masks"].items()}
        inputs["timestep"] = torch.tensor([500.0])
    if way != "bf16":
        _quantize(network, way)
    compiled = torch.compile(network)
    size = sum(one.numel() * one.element_size() for one in network.parameters())

    def run() -> object:
        with torch.no_grad(), on(backend):
            return compiled(**inputs, return_dict=False)

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return Way(run, size, torch.cuda.max_memory_allocated() - before)


def _quantize(network: torch.nn.Module, way: str) -> None:
    """torchao's dynamic quantization, per row in FP8, per token in INT8."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    if way == "torchao fp8":
        quantize_(network, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    else:
        quantize_(network, Int8DynamicActivationInt8WeightConfig())
