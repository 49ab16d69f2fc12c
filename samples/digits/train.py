"""Train the sample: `python -m vdq_export.samples.digits.train --steps 7000` (resumes where it stopped).

Flow matching (x_s = (1-s) x0 + s noise, target noise - x0), sigma logit-normal, 10 % of prompts dropped
for guidance; Muon on the matrices of the blocks, AdamW on the rest; warm-up, constant, linear decay over the last
quarter; the average of the weights is what ships. Every random number derives from (seed, step), so a resumed
run sees the data an uninterrupted one would. The log beside this file says what hardware and minutes it took.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vdq_export.samples.digits.data import all_conditions, embed, load_glyphs, random_clip
from vdq_export.samples.digits.network import build

HERE = Path(__file__).resolve().parent
SEED, LEARNING_RATE, EMA_HORIZON, DROP_PROMPT = 7, 2e-3, 500, 0.1


def matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    """Plain attention; torch's fused CPU kernel spends 5x its time in the bf16 backward pass."""
    return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ value


class Batches:
    """Batch number `step` of a given size, the same whenever it is asked for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.images, labels = load_glyphs()
        self.of_digit = [np.flatnonzero(labels == d) for d in range(10)]
        self.conditions = all_conditions()
        self.prompts = torch.stack([embed(c.text) for c in self.conditions])
        self.no_prompt = embed(None)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clips [B,1,F,H,W], prompts [B,TOKENS,TEXT_DIM], sigmas [B], noise like clips)."""
        rng = np.random.default_rng([SEED, step])
        chosen = rng.integers(len(self.conditions), size=self.size)
        clips = [
            random_clip(self.images[rng.choice(self.of_digit[self.conditions[c].digit])], self.conditions[c], rng)
            for c in chosen
        ]
        prompts = self.prompts[torch.from_numpy(chosen)].clone()
        prompts[torch.from_numpy(rng.random(self.size) < DROP_PROMPT)] = self.no_prompt
        sigmas = 1 / (1 + np.exp(-rng.normal(0.2, 1.1, self.size)))
        noise = rng.standard_normal((self.size, *clips[0].shape)).astype(np.float32)
        return (
            torch.from_numpy(np.stack(clips)),
            prompts,
            torch.from_numpy(sigmas.astype(np.float32)),
            torch.from_numpy(noise),
        )


def make_optimizers(network: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the block matrices, AdamW for everything else."""
    matrices = [p for n, p in network.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in network.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def save_checkpoint(
    path: Path,
    step: int,
    average: dict[str, torch.Tensor],
    network: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    tensors = {f"average/{n}": t for n, t in average.items()}
    tensors |= {f"network/{n}": t.detach() for n, t in network.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    partial = path.with_suffix(".partial")
    save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata={"step": str(step)})
    partial.replace(path)


def load_checkpoint(
    path: Path, average: dict[str, torch.Tensor], network: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> int:
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    average.update({n.removeprefix("average/"): t for n, t in tensors.items() if n.startswith("average/")})
    network.load_state_dict({n.removeprefix("network/"): t for n, t in tensors.items() if n.startswith("network/")})
    for i, optimizer in enumerate(optimizers):
        fresh = optimizer.state_dict()
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer/{i}/"):
                _, _, index, key = name.split("/")
                states.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": fresh["param_groups"]})
    return step


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 200 steps, constant, linear to zero over the last quarter."""
    decay_from = int(steps * 0.75)
    factor = min(1.0, (step + 1) / 200)
    if step >= decay_from:
        factor *= (steps - step) / (steps - decay_from)
    return LEARNING_RATE * factor


def train(steps: int, batch: int, threads: int, out: Path) -> None:
    torch.set_num_threads(threads)
    torch.nn.functional.scaled_dot_product_attention = matmul_attention  # type: ignore[assignment]
    network = build(SEED).train()
    average = {n: t.detach().clone() for n, t in network.state_dict().items()}
    optimizers = make_optimizers(network)
    checkpoint = out / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, average, network, optimizers) if checkpoint.exists() else 0
    compiled, batches = torch.compile(network), Batches(batch)

    def log(text: str) -> None:
        print(text, flush=True)
        with (out / "train.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    log(
        f"# start at step {first} of {steps}: batch {batch}, {threads} CPU threads ({platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, bf16 autocast, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
    )
    begun, running = time.monotonic(), 0.0
    for step in range(first, steps):
        clips, prompts, sigmas, noise = batches(step)
        blend = sigmas.view(-1, 1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = compiled((1 - blend) * clips + blend * noise, sigmas * 1000, prompts, return_dict=False)[0]
        loss = (velocity.float() - (noise - clips)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = 1 - 1 / min(step + 1, EMA_HORIZON)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(f"step {step + 1} loss {running:.4f} minutes {(time.monotonic() - begun) / 60:.1f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, average, network, optimizers)
            save_file({n: t.half().contiguous() for n, t in average.items()}, out / "weights.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    train(arguments.steps, arguments.batch, arguments.threads, arguments.out)


if __name__ == "__main__":
    main()
