"""Train the judge's digit reader: `python -m vdq_export.samples.digits.train_judge` (needs scikit-learn).

Three quarters of the glyphs train it, the rest are held out; both are rendered as frames of moving clips (half-pixel
shifts included) and disturbed with noise, blur and haze, so that it reads generated frames, not only clean ones.
Seeded; judge.log beside this file says what it reached, on what hardware, in how many minutes.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from vdq_export.samples.digits.data import DIRECTIONS, SPEEDS, all_conditions, load_glyphs, random_clip
from vdq_export.samples.digits.judge import DigitsJudge, build_reader, crops, velocities

HERE = Path(__file__).resolve().parent
SEED, LEARNING_RATE, BATCH = 11, 2e-3, 32  # clips a batch; eight frames each


def split_glyphs() -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) glyph numbers; a quarter is held out."""
    order = np.random.Generator(np.random.PCG64(SEED)).permutation(len(load_glyphs()[1]))
    held_out = len(order) // 4
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def render_clips(
    images: np.ndarray, labels: np.ndarray, chosen: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(clips [N, F, H, W] in [0, 1], velocities [N, 2]) of the glyphs `chosen`, each with a random motion."""
    clips, motion = [], []
    for glyph in chosen:
        candidates = [c for c in all_conditions() if c.digit == labels[glyph]]
        condition = candidates[rng.integers(len(candidates))]
        clips.append(random_clip(images[glyph], condition, rng)[0] / 2 + 0.5)
        motion.append(np.array(DIRECTIONS[condition.direction]) * SPEEDS[condition.speed])
    return np.stack(clips), np.stack(motion)


def disturb(clips: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Contrast, blur, noise and haze as an imperfect generator leaves them; shape and range are kept."""
    n = len(clips)
    amount = (rng.random((n, 1, 1, 1)) * 0.5 * (rng.random((n, 1, 1, 1)) < 0.5)).astype(np.float32)
    padded = np.pad(clips, ((0, 0), (0, 0), (1, 1), (1, 1)))
    soft = sum(padded[:, :, y : y + clips.shape[2], x : x + clips.shape[3]] for y in range(3) for x in range(3)) / 9
    clips = (1 - amount) * clips + amount * soft
    clips = clips * rng.uniform(0.75, 1.15, (n, 1, 1, 1)) + rng.uniform(-0.05, 0.05, (n, 1, 1, 1))
    clips = clips + rng.uniform(0, 0.12, (n, 1, 1, 1)) * rng.standard_normal(clips.shape)
    disturbed: np.ndarray = clips.clip(0, 1).astype(np.float32)
    return disturbed


def train(steps: int, threads: int, out: Path) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    images, labels = load_glyphs()
    training, held_out = split_glyphs()
    reader = build_reader().train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    begun, lines, running = time.monotonic(), [], 2.3

    def log(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    log(f"# {steps} steps of {BATCH} clips, {threads} CPU threads ({platform.machine()}), torch {torch.__version__}, "
        f"{sum(p.numel() for p in reader.parameters())} parameters, {len(training)} glyphs")  # fmt: skip
    for step in range(steps):
        rng = np.random.default_rng([SEED, step])
        chosen = rng.choice(training, BATCH)
        clips = disturb(render_clips(images, labels, chosen, rng)[0], rng)
        windows = torch.from_numpy(crops(clips, rng.integers(-1, 2, (BATCH, clips.shape[1], 2))))
        target = torch.from_numpy(labels[chosen]).repeat_interleave(clips.shape[1])
        loss = torch.nn.functional.cross_entropy(reader(windows.flatten(0, 1)[:, None]), target, label_smoothing=0.05)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 500 == 0:
            log(f"step {step + 1} loss {running:.4f} minutes {(time.monotonic() - begun) / 60:.1f}")
    judge = DigitsJudge(reader)
    for name, glyphs in (("training", training), ("held-out", held_out)):
        rng = np.random.default_rng([SEED, 1, len(glyphs)])
        clean, motion = render_clips(images, labels, glyphs, rng)
        for kind, clips in (("clean", clean), ("disturbed", disturb(clean, rng))):
            read = (judge.digits(clips) == labels[glyphs]).mean()
            moved = (np.abs(velocities(clips) - motion).max(1) < 0.25).mean()
            log(f"{name} glyphs, {kind} clips: digit {read:.4f}, motion {moved:.4f} of {len(glyphs)}")
    save_file({n: t.contiguous() for n, t in reader.state_dict().items()}, out / "judge.safetensors")
    (out / "judge.log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    train(arguments.steps, arguments.threads, arguments.out)


if __name__ == "__main__":
    main()
