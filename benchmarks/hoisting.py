"""What leaves the graph of a step: models at their published configurations, traced without weights, cut in parts.

Nothing is run: shares follow from the graphs. Weights count as float32, as traced. Prompts are as long as published,
the latents of HunyuanVideo and Wan small: shares of weights do not depend on that, those of operations fall as the clip
grows.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import diffusers.models.transformers as transformers
import torch

from benchmarks import common
from vdq_export import hoisting, pipeline
from vdq_export.contract import PassContext
from vdq_export.trace_weightless import trace_weightless

Inputs = dict[str, torch.Tensor]
PARTS = ("prompt", "step", "mixed", "body")


def _inputs(latent: tuple[int, ...], prompt: tuple[int, ...], **more: torch.Tensor) -> Inputs:
    named = {"hidden_states": torch.zeros(latent), "timestep": torch.zeros(1)}
    return {**named, "encoder_hidden_states": torch.zeros(prompt), **more}


def wan(layers: int, heads: int, ffn: int) -> torch.nn.Module:
    made: torch.nn.Module = transformers.WanTransformer3DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, in_channels=16,
        out_channels=16, patch_size=(1, 2, 2), text_dim=4096, freq_dim=256, cross_attn_norm=True, rope_max_seq_len=1024,
    )  # fmt: skip
    return made


def hunyuan_video(dual: int, single: int) -> torch.nn.Module:
    made: torch.nn.Module = transformers.HunyuanVideoTransformer3DModel(
        num_layers=dual, num_single_layers=single, num_refiner_layers=2, in_channels=16, out_channels=16,
        num_attention_heads=24, attention_head_dim=128, mlp_ratio=4.0, patch_size=2, patch_size_t=1,
        text_embed_dim=4096, pooled_projection_dim=768, guidance_embeds=True, rope_theta=256.0,
        rope_axes_dim=(16, 56, 56),
    )  # fmt: skip
    return made


def cogvideox(layers: int) -> torch.nn.Module:
    made: torch.nn.Module = transformers.CogVideoXTransformer3DModel(
        num_layers=layers, num_attention_heads=30, attention_head_dim=64, in_channels=16, out_channels=16, patch_size=2,
        sample_frames=49, sample_height=60, sample_width=90, text_embed_dim=4096, max_text_seq_length=226,
        time_embed_dim=512,
    )  # fmt: skip
    return made


# Model -> (its constructor, given 1 for one block of each kind; the inputs, the latents first).
MODELS: dict[str, tuple[Callable[[int | None], torch.nn.Module], Inputs]] = {
    "HunyuanVideo": (
        lambda blocks: hunyuan_video(blocks or 20, blocks or 40),
        _inputs(
            (1, 16, 5, 32, 48), (1, 256, 4096), encoder_attention_mask=torch.ones(1, 256, dtype=torch.int64),
            pooled_projections=torch.zeros(1, 768), guidance=torch.zeros(1),
        ),
    ),
    "CogVideoX-2b": (
        lambda blocks: cogvideox(blocks or 30),
        _inputs((1, 13, 16, 60, 90), (1, 226, 4096), timestep=torch.zeros(1, dtype=torch.int64)),
    ),
    "Wan2.1-1.3B": (lambda blocks: wan(blocks or 30, 12, 8960), _inputs((1, 16, 2, 32, 32), (1, 512, 4096))),
}  # fmt: skip


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Parts of one model: work of each, values that cross, seconds and peak memory of the process."""
    make, inputs = MODELS[settings["model"]]
    begin = time.perf_counter()
    graph = trace_weightless(lambda: make(1 if settings["small"] else None), inputs, name=settings["model"])
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    traced = time.perf_counter()
    early: dict[str, hoisting.Role] = dict.fromkeys(inputs, "prompt")
    hoisted = hoisting.split(graph, {**early, "hidden_states": "latents", "timestep": "timestep"})
    work = {name: hoisting.work(part) for name, part in hoisted.parts().items()}
    return {
        "seconds": {"trace": traced - begin, "split": time.perf_counter() - traced},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "weight_bytes": {name: one.weight_bytes for name, one in work.items()},
        "multiply_adds": {name: one.multiply_adds for name, one in work.items()},
        "nodes": {name: one.nodes for name, one in work.items()},
        "crossing_bytes": [one.nbytes for one in hoisted.crossings],
    }


def run(arguments: argparse.Namespace) -> None:
    data = {
        name: common.in_child("hoisting", "measured", {"model": name, "small": arguments.small}, arguments.threads)
        for name in MODELS
    }
    heads = ["model", "weights GB", *(f"{part} %" for part in PARTS), "multiply-adds saved %", "values cross", "MB"]
    rows = []
    for name, one in data.items():
        weights, adds = one["weight_bytes"], one["multiply_adds"]
        shares = [f"{100 * weights.get(part, 0) / sum(weights.values()):.1f}" for part in PARTS]
        saved = f"{100 * (adds.get('prompt', 0) + adds.get('step', 0)) / sum(adds.values()):.1f}"
        crossing = one["crossing_bytes"]
        rows.append(
            [name, f"{sum(weights.values()) / 1e9:.1f}", *shares, saved,
             str(len(crossing)), f"{sum(crossing) / 1e6:.1f}"]
        )  # fmt: skip
    notes = (
        "Shares of the weights' bytes by the graph they are in afterwards: `prompt` runs once a video, `step` once an "
        "export, `mixed` once a video and step, `body` at every step. Saved: what a step no longer does (`prompt`, "
        "`step`), of what it did."
    )
    common.write("hoisting", "What leaves the graph of a step", [("", heads, rows)], data, notes, small=arguments.small)


if __name__ == "__main__":
    common.main(common.parser(__doc__), run, {"measured": measured})
