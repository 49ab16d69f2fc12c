"""A whole step of a network: our program as one CUDA graph against torch.compile in bfloat16, and torchao where it is.

The float network is diffusers' own with random weights, compiled, on the fastest of torch's attention backends at this
shape. Both run one guidance branch. Ours does what a step does once the prompt's part has run ahead (docs/hoisting.md).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cuda import graphs
from benchmarks.cuda.timing import alternating, captured, peak_memory
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.program import Program

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
GOALS = {"w8a8": 1.25, "w8a8-attention": 1.8}
ROUNDS = 8
# The float network beside each kept graph: class, settings, inputs by name, (heads, tokens, channels) of its attention.
NETWORKS: dict[str, dict[str, Any]] = {
    "wan-1.3b": {
        "class": "WanTransformer3DModel",
        "settings": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "inputs": {"hidden_states": (1, 16, 21, 60, 104), "encoder_hidden_states": (1, 512, 4096)},
        "attention": (12, 32_760, 128),
    }
}


def measure(name: str, folder: Path, *, torchao: bool = True) -> list[dict[str, Any]]:
    """One row for each way to run network `name`: milliseconds, ratio to bfloat16, bytes of weights, peak bytes."""
    kinds = [one.removeprefix(f"{name}.") for one in graphs.names() if one.startswith(f"{name}.")]
    programs = {kind: program(f"{name}.{kind}", folder / kind) for kind in kinds}
    backend, attention = best_attention(*NETWORKS[name]["attention"])
    runs: dict[str, Callable[[], object]] = {}
    weights: dict[str, int] = {}
    for way in ("bf16", *(("torchao fp8", "torchao int8") if torchao and find_spec("torchao") else ())):
        runs[way], weights[way] = baseline(name, backend, way)
    for kind, (made, feeds) in programs.items():
        runs[kind] = lambda made=made, feeds=feeds: made(feeds)
        weights[kind] = made.weight_bytes
    times = alternating(runs, ROUNDS)
    rows = []
    for way, run in runs.items():
        rows.append({
            "network": name, "way": way, "ms": times[way], "ratio": times["bf16"] / times[way],
            "goal": GOALS.get(way), "weight_bytes": weights[way], "peak_bytes": peak_memory(run),
            "attention": f"{backend.name.lower()} {attention:.2f} ms" if way == "bf16" else "",
        })  # fmt: skip
    return rows


def program(name: str, folder: Path) -> tuple[Program, dict[str, torch.Tensor]]:
    """(the program, captured; random inputs)"""
    made = lower(graphs.materialize(name, folder), device="cuda", dtype=torch.float16).capture()
    random = torch.Generator("cuda").manual_seed(0)
    feeds = {
        one.name: torch.randn(one.shape, generator=random, device="cuda").to(one.dtype)
        if one.dtype.is_floating_point
        else torch.zeros(one.shape, dtype=one.dtype, device="cuda")
        for one in made.inputs
    }
    found = made(feeds)
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise RuntimeError(f"{name} gives numbers that are not finite")
    return made, feeds


def best_attention(heads: int, tokens: int, channels: int) -> tuple[SDPBackend, float]:
    """(torch's fastest backend at this shape in bfloat16, milliseconds)"""
    q, k, v = (torch.randn(1, heads, tokens, channels, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    runs: dict[str, Callable[[], object]] = {}
    for backend in BACKENDS:

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            run()
        except RuntimeError:  # not in this build, or not for this shape
            continue
        runs[backend.name] = captured(run)
    times = alternating(runs, ROUNDS)
    best = min(times, key=lambda name: times[name])
    return SDPBackend[best], times[best]


def baseline(name: str, backend: SDPBackend, way: str) -> tuple[Callable[[], object], int]:
    """(the compiled float network on random inputs, bytes of its weights); way: "bf16", or torchao's quantization."""
    about = NETWORKS[name]
    with torch.device("cuda"):
        torch.manual_seed(0)
        network = getattr(diffusers, about["class"])(**about["settings"]).bfloat16().eval().requires_grad_(False)
        inputs = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in about["inputs"].items()}
        inputs["timestep"] = torch.tensor([500.0])
    if way != "bf16":
        _quantize(network, way)
    compiled = torch.compile(network)
    size = sum(one.numel() * one.element_size() for one in network.parameters())

    def run() -> object:
        with torch.no_grad(), sdpa_kernel(backend) if backend else nullcontext():
            return compiled(**inputs, return_dict=False)

    return run, size


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
