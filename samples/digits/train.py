"""Train the sample: `python -m vdq_export.samples.digits.train [--expert high|low]` (resumes where it stopped).

Flow matching (x_s = (1-s) x0 + s noise, target noise - x0), sigma logit-normal, 10 % of prompts dropped
for guidance; Muon on the matrices of the blocks, AdamW on the rest; warm-up, constant, linear decay over the last
quarter; the average of the weights is what ships. Every random number derives from (seed, step), so a resumed
run sees the data an uninterrupted one would. The log beside this file says what hardware and minutes it took.

With --expert the finished network is tuned further on the noise levels of one expert alone: the same logit-normal,
cut to the expert's range, half the learning rate, falling from the start. Its log ends with the loss on clips and noise
that neither run saw, over that range, of the base network and of the expert as it is stored.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vdq_export.model import Denoiser
from vdq_export.samples.digits import experts
from vdq_export.samples.digits.data import all_conditions, embed, load_glyphs, random_clip
from vdq_export.samples.digits.network import build

HERE = Path(__file__).resolve().parent
SEED, DROP_PROMPT = 7, 0.1
SIGMA_MEAN, SIGMA_SPREAD = 0.2, 1.1  # of the normal whose logistic the noise levels are
VALIDATION, VALIDATION_BATCHES = 1_000_000, 16  # number of the first batch, which no run's steps reach; how many


@dataclass(frozen=True)
class Plan:
    """What differs between the two kinds of run. decay: the share of the run over which the learning rate falls.

    horizon: steps the average of the weights looks back. seed: of the data.
    """

    steps: int
    rate: float
    warm_up: int
    decay: float
    horizon: int
    seed: int

    def learning_rate(self, step: int) -> float:
        """Warm-up, constant, linear to zero."""
        decay_from = int(self.steps * (1 - self.decay))
        factor = min(1.0, (step + 1) / self.warm_up)
        if step >= decay_from:
            factor *= (self.steps - step) / (self.steps - decay_from)
        return self.rate * factor


def plan_of(expert: str, steps: int | None) -> Plan:
    """`expert` "" for the base network; steps None for the usual number."""
    if not expert:
        return Plan(steps=steps or 7000, rate=2e-3, warm_up=200, decay=0.25, horizon=500, seed=SEED)
    return Plan(steps=steps or 600, rate=1e-3, warm_up=50, decay=1.0, horizon=100, seed=SEED + 1)


def matmul_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: object) -> torch.Tensor:
    """Plain attention; torch's fused CPU kernel spends 5x its time in the bf16 backward pass."""
    return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, -1) @ value


class Batches:
    """Batch number `step` of a given size, the same whenever it is asked for. t: the range of noise levels × 1000."""

    def __init__(self, size: int, seed: int = SEED, t: tuple[float, float] | None = None) -> None:
        self.size, self.seed, self.t = size, seed, t
        self.images, labels = load_glyphs()
        self.of_digit = [np.flatnonzero(labels == d) for d in range(10)]
        self.conditions = all_conditions()
        self.prompts = torch.stack([embed(c.text) for c in self.conditions])
        self.no_prompt = embed(None)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clips [B,1,F,H,W], prompts [B,TOKENS,TEXT_DIM], sigmas [B], noise like clips)."""
        rng = np.random.default_rng([self.seed, step])
        chosen = rng.integers(len(self.conditions), size=self.size)
        clips = [
            random_clip(self.images[rng.choice(self.of_digit[self.conditions[c].digit])], self.conditions[c], rng)
            for c in chosen
        ]
        prompts = self.prompts[torch.from_numpy(chosen)].clone()
        prompts[torch.from_numpy(rng.random(self.size) < DROP_PROMPT)] = self.no_prompt
        sigmas = self._sigmas(rng)
        noise = rng.standard_normal((self.size, *clips[0].shape)).astype(np.float32)
        return (
            torch.from_numpy(np.stack(clips)),
            prompts,
            torch.from_numpy(sigmas.astype(np.float32)),
            torch.from_numpy(noise),
        )

    def _sigmas(self, rng: np.random.Generator) -> np.ndarray:
        """[B] noise levels, logit-normal; with a range, those of the whole distribution that fall into it."""
        wanted = np.empty(0)
        while len(wanted) < self.size:
            drawn = 1 / (1 + np.exp(-rng.normal(SIGMA_MEAN, SIGMA_SPREAD, self.size)))
            if self.t is not None:
                drawn = drawn[(drawn * 1000 >= self.t[0]) & (drawn * 1000 < self.t[1])]
            wanted = np.concatenate([wanted, drawn])
        return wanted[: self.size]


def make_optimizers(network: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the block matrices, AdamW for everything else; the learning rate is set at every step."""
    matrices = [p for n, p in network.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in network.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.0, weight_decay=0.0, betas=(0.9, 0.99)),
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


def loss_of(denoiser: Denoiser, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of the predicted velocity over a batch as Batches makes it."""
    clips, prompts, sigmas, noise = batch
    blend = sigmas.view(-1, 1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = denoiser((1 - blend) * clips + blend * noise, sigmas * 1000, prompts, return_dict=False)[0]
    loss: torch.Tensor = (velocity.float() - (noise - clips)).square().mean()
    return loss


def validation_loss(state: experts.State, t: tuple[float, float], batches: int = VALIDATION_BATCHES) -> float:
    """Mean loss of the network with weights `state` over validation batches with noise levels in the range."""
    network, made = build(), Batches(64, t=t)
    network.load_state_dict(dict(state))
    with torch.no_grad():
        return float(np.mean([loss_of(network, made(VALIDATION + index)).item() for index in range(batches)]))


def train(plan: Plan, batch: int, threads: int, out: Path, expert: str = "") -> None:
    """Run `plan` to its end and write weights, checkpoint and log into `out`; `expert` names one of experts.RANGES."""
    torch.set_num_threads(threads)
    torch.nn.functional.scaled_dot_product_attention = matmul_attention  # type: ignore[assignment]
    network = build(SEED).train()
    suffix = f"-{expert}" if expert else ""
    base = {n: t.float() for n, t in load_file(HERE / "weights.safetensors").items()} if expert else {}
    if expert:
        network.load_state_dict(base)
    average = {n: t.detach().clone() for n, t in network.state_dict().items()}
    optimizers = make_optimizers(network)
    checkpoint = out / f"checkpoint{suffix}.safetensors"
    first = load_checkpoint(checkpoint, average, network, optimizers) if checkpoint.exists() else 0
    t_range = experts.RANGES[expert] if expert else None
    compiled, batches = torch.compile(network), Batches(batch, plan.seed, t_range)

    def log(text: str) -> None:
        print(text, flush=True)
        with (out / f"train{suffix}.log").open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def save(step: int) -> None:
        save_checkpoint(checkpoint, step, average, network, optimizers)
        if expert:
            save_file(experts.encode(base, average), out / experts.weights_name(expert))
        else:
            save_file({n: t.half().contiguous() for n, t in average.items()}, out / "weights.safetensors")

    log(
        f"# {f'expert {expert}, ' if expert else ''}start at step {first} of {plan.steps}: batch {batch}, {threads} "
        f"CPU threads ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, "
        f"bf16 autocast, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"
    )
    begun, running = time.monotonic(), 0.0
    for step in range(first, plan.steps):
        loss = loss_of(compiled, batches(step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        keep = 1 - 1 / min(step + 1, plan.horizon)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == plan.steps:
            log(f"step {step + 1} loss {running:.4f} minutes {(time.monotonic() - begun) / 60:.1f}")
        if (step + 1) % 250 == 0 or step + 1 == plan.steps:
            save(step + 1)
    if t_range:
        stored = experts.decode(base, load_file(out / experts.weights_name(expert)))
        scores = {"base": validation_loss(base, t_range), "expert": validation_loss(stored, t_range)}
        told = ", ".join(f"{who} {score:.5f}" for who, score in scores.items())
        log(f"validation loss for t in [{t_range[0]:g}, {t_range[1]:g}), {64 * VALIDATION_BATCHES} clips: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expert", choices=sorted(experts.RANGES), default="", help="tune one expert of digits-moe")
    parser.add_argument("--steps", type=int, default=None, help="default 7000, an expert 600")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    plan = plan_of(arguments.expert, arguments.steps)
    train(plan, arguments.batch, arguments.threads, arguments.out, arguments.expert)


if __name__ == "__main__":
    main()
