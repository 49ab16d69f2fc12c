"""Wan-1.3B-shaped blocks with random weights, and everything the contestants start from, made once on disk.

Legend: width = heads x head_dim; tokens = latent frames x height/2 x width/2 (patches are 1 x 2 x 2).
Random weights say what a model costs and how much noise its shapes make, nothing about a video.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from benchmarks.common import ROOT, WORK
from vdq_export.compiler import make_plan
from vdq_export.graph import Graph
from vdq_export.model import Model, Step, Trajectory
from vdq_export.trace import trace

STEPS = 20
STRIDE = 4
SHIFT = 3.0
CALIBRATION_SEED, HELD_OUT_SEED, WEIGHT_SEED = 1000, 2000, 0


@dataclass(frozen=True)
class Shape:
    """Sizes of the network and of one call. clips: calibration prompts, each with every STRIDE-th step."""

    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    layers: int = 2
    latent: tuple[int, int, int] = (2, 32, 32)
    text_tokens: int = 64
    text_dim: int = 4096
    clips: int = 8

    @property
    def title(self) -> str:
        frames, height, width = self.latent
        return (
            f"width {self.heads * self.head_dim}, FFN {self.ffn}, {self.heads} heads, {self.layers} blocks, "
            f"{frames * height * width // 4} tokens, {self.text_tokens} text tokens of {self.text_dim}"
        )


FULL = Shape()
SMALL = Shape(heads=2, ffn=704, latent=(1, 16, 16), text_tokens=16, text_dim=128)


@dataclass(frozen=True)
class Prepared:
    """Files on disk. calibration, held_out: .npz of calls, keys "<call>/<input>"; both are the same for everybody."""

    folder: Path
    shape: Shape

    @property
    def plain(self) -> Path:
        """What torch.onnx.export writes by default."""
        return self.folder / "plain.onnx"

    @property
    def traced(self) -> Path:
        """The float graph our compiler traces."""
        return self.folder / "traced.onnx"

    @property
    def record(self) -> Path:
        return self.folder / "record.safetensors"

    @property
    def source(self) -> Path:
        """The hash of the network's weights, as text."""
        return self.folder / "source"

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration.npz"

    @property
    def held_out(self) -> Path:
        return self.folder / "held_out.npz"

    def bundle(self, bins: int, *, hoist: bool = True) -> Path:
        return self.folder / f"bundle.tsw{bins}{'' if hoist else '.whole'}"


def build(shape: Shape) -> torch.nn.Module:
    """The network, seeded: linears N(0, 1/K), so that every block adds about as much as it is given; norms 1 ± 10 %.

    With diffusers' own initialisation the gates are near zero: blocks add almost nothing and their noise hides.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(WEIGHT_SEED)
    network: torch.nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=shape.text_dim,
        freq_dim=256,
        ffn_dim=shape.ffn,
        num_layers=shape.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0.0, module.in_features**-0.5)
            elif "norm" in name and getattr(module, "weight", None) is not None:
                module.weight.add_(0.1 * torch.randn_like(module.weight))
    return network.eval()


def timesteps() -> list[float]:
    """t of the STEPS calls of a shifted flow-matching schedule, descending from 1000."""
    even = np.linspace(1.0, 0.0, STEPS + 1)[:-1]
    return [float(np.float32(1000 * t)) for t in SHIFT * even / (1 + (SHIFT - 1) * even)]


class Clips:
    """Trajectories of random smooth clips on their way from noise: x_t = (1 − t)·x0 + t·noise. Re-iterable."""

    def __init__(self, shape: Shape, seeds: Sequence[int], steps: Sequence[float], stride: int = 1) -> None:
        """stride: clip i makes the calls i, i + stride, … only, so that few calls show many prompts."""
        self.shape, self.seeds, self.steps, self.stride = shape, seeds, steps, stride

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Trajectory]:
        for number, seed in enumerate(self.seeds):
            yield self._clip(seed, self.steps[number % self.stride :: self.stride])

    def _clip(self, seed: int, steps: Sequence[float]) -> list[Step]:
        generator = torch.Generator().manual_seed(seed)
        frames, height, width = self.shape.latent
        coarse = torch.randn(1, 16, frames, height // 4, width // 4, generator=generator)
        clean = torch.nn.functional.interpolate(coarse, size=self.shape.latent, mode="trilinear")
        noise = torch.randn(clean.shape, generator=generator)
        text = torch.randn(1, self.shape.text_tokens, self.shape.text_dim, generator=generator)
        return [self._step(t, (1 - t / 1000) * clean + t / 1000 * noise, text) for t in steps]

    @staticmethod
    def _step(t: float, latents: torch.Tensor, text: torch.Tensor) -> Step:
        inputs = {"hidden_states": latents, "timestep": torch.full((1,), t), "encoder_hidden_states": text}
        return {"t": t, "branch": "cond", "inputs": inputs}


def model(shape: Shape, module: torch.nn.Module | None = None) -> Model:
    """The blocks as a Model; `module` stands in for the network where the graph is already on disk."""
    clips = Clips(shape, range(CALIBRATION_SEED, CALIBRATION_SEED + shape.clips), timesteps(), STRIDE)
    example = clips._clip(HELD_OUT_SEED, clips.steps)[0]["inputs"]
    return Model(module=module or build(shape), example_inputs=example, trajectories=clips, name="wan-blocks")


def prepare(shape: Shape) -> Prepared:
    """Export, trace and calibrate unless that was done before with these sources."""
    key = hashlib.sha256(json.dumps(asdict(shape)).encode() + _sources()).hexdigest()[:12]
    kind = "small" if shape == SMALL else "full"
    made = Prepared(WORK / f"wan-{kind}-{key}", shape)
    if made.folder.exists():
        return made
    for stale in WORK.glob(f"wan-{kind}-*"):
        shutil.rmtree(stale)
    partial = Prepared(WORK / f"wan-{kind}.partial", shape)
    shutil.rmtree(partial.folder, ignore_errors=True)
    partial.folder.mkdir(parents=True)
    network = model(shape)
    _save_calls(partial.calibration, network.iter_trajectories())
    held_out = timesteps()[STEPS // 8 :: STEPS // 4]  # one in each quarter of the schedule
    _save_calls(partial.held_out, Clips(shape, [HELD_OUT_SEED], held_out))
    export_plain(network, partial.plain)
    graph = trace(network)
    save_external(graph, partial.traced)
    partial.source.write_text(graph.source)
    make_plan(
        network, target="ort-int8", tsw=1, recipe="static-minmax", traced={"": graph}, save_calibration=partial.record
    )
    partial.folder.rename(made.folder)
    return made


def export_plain(network: Model, path: Path) -> None:
    """torch.onnx.export with its defaults: the float model that a user of onnxruntime has."""
    with torch.no_grad():
        program = torch.onnx.export(network.module, (), kwargs=dict(network.example_inputs), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path), external_data=True)


def save_external(graph: Graph, path: Path) -> None:
    """`graph` with its weights in a file beside it, where any reader can map them."""
    onnx.save_model(graph.to_proto(), path, save_as_external_data=True, location=f"{path.name}.data")


def _save_calls(path: Path, trajectories: Any) -> None:
    steps = [step for trajectory in trajectories for step in trajectory]
    arrays = {f"{i}/{name}": t.numpy() for i, step in enumerate(steps) for name, t in step["inputs"].items()}
    np.savez(path, allow_pickle=False, **arrays)


def _sources() -> bytes:
    """What the prepared files depend on: the code that traces and calibrates, and this file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for folder in ("vdq_export", "passes", "calib", "targets"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            digest.update(path.read_bytes())
    return digest.digest()
