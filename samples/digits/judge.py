"""The judge: what a generated clip shows, measured without a reference clip.

The digit is read by a small convolutional network (train_judge.py, judge.safetensors) that looks at each frame around
its centre of mass and adds its logits over the frames. Direction and speed are not learned: the centre of mass is
followed over the frames and its mean velocity, in pixels a frame, is compared with the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np
import torch
from safetensors.torch import load_file

from vdq_export.samples.digits.data import DIRECTIONS, SPEEDS
from vdq_export.samples.digits.sampler import case_condition

CROP = 12  # the 8x8 glyph and room for a centre of mass that is off the glyph's middle
FLOOR = 0.25  # subtracted before weighing: haze and faint noise must not drag the centre of mass
TOLERANCE = 0.25  # pixels a frame: half the distance between the two speeds


def centres(clips: np.ndarray) -> np.ndarray:
    """[N, F, 2] centre of mass (row, column) of each frame of clips [N, F, H, W] in [0, 1]; an empty frame's middle."""
    mass = np.maximum(clips - FLOOR, 0.0).astype(np.float64)
    total = mass.sum((2, 3))
    rows, columns = np.arange(clips.shape[2]), np.arange(clips.shape[3])
    empty = total == 0
    total = np.where(empty, 1.0, total)
    centre = np.stack([mass.sum(3) @ rows / total, mass.sum(2) @ columns / total], -1)
    centre[empty] = ((clips.shape[2] - 1) / 2, (clips.shape[3] - 1) / 2)
    return centre


def velocities(clips: np.ndarray) -> np.ndarray:
    """[N, 2] mean velocity (down, right), pixels a frame: the least-squares slope of the centre of mass over time."""
    time = np.arange(clips.shape[1]) - (clips.shape[1] - 1) / 2
    slope: np.ndarray = np.einsum("f,nfa->na", time, centres(clips)) / (time**2).sum()
    return slope


def crops(clips: np.ndarray, jitter: np.ndarray | None = None) -> np.ndarray:
    """[N, F, CROP, CROP] windows around the centres of mass of clips [N, F, H, W]; zeros beyond the border.

    jitter: [N, F, 2] whole pixels added to the centres (training only).
    """
    half = CROP // 2
    corner = np.floor(centres(clips) + 0.5).astype(int)  # the padding of `half` makes a centre its window's corner
    if jitter is not None:
        corner = corner + jitter
    padded = np.pad(clips, ((0, 0), (0, 0), (half, half), (half, half)))
    limit = padded.shape[2] - CROP
    corner = corner.clip(0, limit)
    offsets = np.arange(CROP)
    n, f = np.ogrid[: clips.shape[0], : clips.shape[1]]
    rows = corner[..., 0, None, None] + offsets[:, None]
    columns = corner[..., 1, None, None] + offsets[None, :]
    window: np.ndarray = padded[n[..., None, None], f[..., None, None], rows, columns]
    return window.astype(np.float32)


def build_reader() -> torch.nn.Module:
    """[B, 1, CROP, CROP] in [0, 1] -> logits [B, 10]; 91 thousand parameters."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 3, padding=1), torch.nn.GELU(),
        torch.nn.Conv2d(24, 32, 3, padding=1, stride=2), torch.nn.GELU(),
        torch.nn.Conv2d(32, 48, 3, padding=1), torch.nn.GELU(),
        torch.nn.Conv2d(48, 64, 3), torch.nn.GELU(),
        torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 40), torch.nn.GELU(), torch.nn.Linear(40, 10),
    )  # fmt: skip


class DigitsJudge:
    """vdq_export.model.Judge of the sample. Needs no scikit-learn."""

    def __init__(self, reader: torch.nn.Module | None = None) -> None:
        """reader: as build_reader() makes it; None loads the trained one of the package."""
        if reader is None:
            reader = build_reader()
            with resources.as_file(resources.files("vdq_export.samples.digits") / "judge.safetensors") as path:
                reader.load_state_dict(load_file(path))
        self.reader = reader.eval()

    def digits(self, clips: np.ndarray) -> np.ndarray:
        """[N] digit read from each clip [N, F, H, W] in [0, 1]."""
        window = torch.from_numpy(crops(clips))
        with torch.no_grad():
            logits = self.reader(window.flatten(0, 1)[:, None]).unflatten(0, window.shape[:2])
        read: np.ndarray = logits.log_softmax(-1).sum(1).argmax(-1).numpy()
        return read

    def verdicts(self, clips: Sequence[np.ndarray], cases: Sequence[int]) -> dict[str, np.ndarray]:
        """{measure: [N] right or wrong} for clips [1, F, H, W] in [0, 1] of the given cases.

        digit: the digit read is the prompt's. direction: the stronger component of the velocity is along the prompt's
        axis, with its sign, and at least TOLERANCE. speed: the velocity along the measured axis is within TOLERANCE
        of the prompt's. motion: direction and speed. Raises ValueError when the two lengths differ or are 0.
        """
        if len(clips) != len(cases) or not len(clips):
            raise ValueError(f"{len(clips)} clips for {len(cases)} cases")
        stacked = np.stack([np.asarray(clip, np.float32)[0] for clip in clips])
        conditions = [case_condition(case) for case in cases]
        velocity = velocities(stacked)
        way = np.array([DIRECTIONS[c.direction] for c in conditions])
        along = np.abs(velocity).max(1)
        direction = ((velocity * way).sum(1) >= along) & (along >= TOLERANCE)
        speed = np.abs(along - np.array([SPEEDS[c.speed] for c in conditions])) < TOLERANCE
        digit = self.digits(stacked) == np.array([c.digit for c in conditions])
        return {"digit": digit, "direction": direction, "speed": speed, "motion": direction & speed}

    def __call__(self, clips: Sequence[np.ndarray], cases: Sequence[int]) -> dict[str, float]:
        """{measure: fraction right}; see `verdicts`."""
        return {measure: float(right.mean()) for measure, right in self.verdicts(clips, cases).items()}
