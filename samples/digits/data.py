"""Moving handwritten digits: the clips the sample model is trained on and the prompts that ask for them.

A clip is [1, F, H, W] in [-1, 1]: one 8x8 handwritten digit (the data set inside scikit-learn) that
crosses a 16x16 canvas in one of four directions at one of two speeds, never touching the border.
A prompt is eight tokens, "the digit D moves DIR at SPEED speed"; its embedding is a fixed table, as a
frozen text encoder would give. The unconditional prompt is eight padding tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

FRAMES, SIZE, DIGIT = 8, 16, 8
TOKENS, TEXT_DIM = 8, 64
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SPEEDS: dict[str, float] = {"slow": 0.5, "fast": 1.0}
_NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_VOCABULARY = ["<pad>", "the", "digit", "moves", "at", "speed", *_NUMERALS, *DIRECTIONS, *SPEEDS]


@dataclass(frozen=True)
class Condition:
    """What one clip shows; `direction` is a key of DIRECTIONS, `speed` of SPEEDS."""

    digit: int
    direction: str
    speed: str

    @property
    def text(self) -> str:
        return f"the digit {_NUMERALS[self.digit]} moves {self.direction} at {self.speed} speed"


def all_conditions() -> list[Condition]:
    """The 80 combinations, digit slowest."""
    return [Condition(d, way, speed) for d in range(10) for way in DIRECTIONS for speed in SPEEDS]


def embedding_table() -> torch.Tensor:
    """[V, TEXT_DIM] frozen token embeddings, the same on every machine (numpy's PCG64 is specified)."""
    table = np.random.Generator(np.random.PCG64(20)).standard_normal((len(_VOCABULARY), TEXT_DIM))
    return torch.from_numpy(table.astype(np.float32))


def embed(text: str | None) -> torch.Tensor:
    """[TOKENS, TEXT_DIM] embedding of a prompt; None is the unconditional one.

    Raises ValueError for a word outside the vocabulary or a prompt of another length.
    """
    words = text.split() if text else ["<pad>"] * TOKENS
    unknown = [w for w in words if w not in _VOCABULARY]
    if unknown or len(words) != TOKENS:
        raise ValueError(f"prompt {text!r}: need {TOKENS} known words, got {len(words)}, unknown {unknown}")
    return embedding_table()[[_VOCABULARY.index(w) for w in words]]


def load_glyphs() -> tuple[np.ndarray, np.ndarray]:
    """(images [1797, 8, 8] in [0, 1], labels [1797]) from scikit-learn's bundled data set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def render(glyph: np.ndarray, top: float, left: float, direction: str, speed: str) -> np.ndarray:
    """One clip [1, F, H, W] in [-1, 1]; positions in pixels, sub-pixel ones by bilinear weights."""
    dy, dx = DIRECTIONS[direction]
    clip = np.full((1, FRAMES, SIZE, SIZE), -1.0, np.float32)
    for frame in range(FRAMES):
        y, x = top + dy * SPEEDS[speed] * frame, left + dx * SPEEDS[speed] * frame
        y0, x0 = int(np.floor(y)), int(np.floor(x))
        fy, fx = y - y0, x - x0
        canvas = np.zeros((SIZE + 1, SIZE + 1), np.float32)
        for oy, ox in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (fy if oy else 1 - fy) * (fx if ox else 1 - fx)
            if weight:
                canvas[y0 + oy : y0 + oy + DIGIT, x0 + ox : x0 + ox + DIGIT] += weight * glyph
        clip[0, frame] = canvas[:SIZE, :SIZE] * 2 - 1
    return clip


def random_clip(glyph: np.ndarray, condition: Condition, rng: np.random.Generator) -> np.ndarray:
    """A clip of `condition` from a random start whose whole path stays on the canvas."""
    room = SIZE - DIGIT
    travel = SPEEDS[condition.speed] * (FRAMES - 1)
    dy, dx = DIRECTIONS[condition.direction]

    def start(step: int) -> float:
        if step == 0:
            return float(rng.integers(0, room + 1))
        first = float(rng.integers(0, int(np.floor(room - travel)) + 1))
        return first if step > 0 else room - first

    return render(glyph, start(dy), start(dx), condition.direction, condition.speed)
