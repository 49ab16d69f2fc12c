"""Clips as pictures inside the page: the frames of one side in a row, as a PNG in a data: address."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vdq_export.drawing.pixels import Pixels
from vdq_export.report.content import ClipPair

DIFFERENCE_GAIN = 4
BUDGET = 5_000_000  # bytes of all pictures of a page; larger clips are shown smaller
WIDEST = 16_384  # pixels of a picture's edge: what every browser draws


@dataclass(frozen=True)
class Panel:
    """One side of a clip, frame after frame from left to right, wrapped into `columns`. width, height: of a frame."""

    title: str
    address: str
    width: int
    height: int
    columns: int


@dataclass(frozen=True)
class Strip:
    """One clip: what stands side by side. shrunk: pixels of the clip along one edge of a shown pixel."""

    name: str
    frames: int
    shrunk: int
    panels: tuple[Panel, ...]


def strips(clips: Sequence[ClipPair], others: Sequence[ClipPair] = (), budget: int = BUDGET) -> tuple[Strip, ...]:
    """The clips as pictures of `budget` bytes at most, shrunk by the same whole number as far as that takes.

    others: of a bundle that is compared with; those of equal name stand beside.
    """
    beside = {one.name: one for one in others}
    for shrunk in (1, 2, 3, 4, 6, 8, 12, 16):
        made = tuple(_strip(one, beside.get(one.name), shrunk) for one in clips)
        if sum(len(panel.address) for one in made for panel in one.panels) <= budget:
            break
    return made if clips else ()


def _strip(clip: ClipPair, other: ClipPair | None, shrunk: int) -> Strip:
    sides = {
        "float": clip.reference,
        f"quantized, {clip.psnr_db:.1f} dB": clip.quantized,
        f"difference ×{DIFFERENCE_GAIN}": _difference(clip),
    }
    if other is not None and other.quantized.shape == clip.reference.shape:
        sides[f"compared with, {other.psnr_db:.1f} dB"] = other.quantized
        sides[f"its difference ×{DIFFERENCE_GAIN}"] = _difference(other)
    panels = tuple(_panel(title, frames, shrunk) for title, frames in sides.items())
    return Strip(clip.name, len(clip.reference), shrunk, panels)


def _difference(clip: ClipPair) -> Pixels:
    apart = np.abs(clip.reference.astype(np.int16) - clip.quantized) * DIFFERENCE_GAIN
    found: Pixels = apart.clip(0, 255).astype(np.uint8)
    return found


def _panel(title: str, frames: Pixels, shrunk: int) -> Panel:
    shown = _smaller(frames, shrunk)
    count, height, width, _ = shown.shape
    columns = max(1, min(count, WIDEST // width))
    rows = -(-count // columns)
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for number, frame in enumerate(shown):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = frame
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG", optimize=True)
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return Panel(title, address, width, height, columns)


def _smaller(frames: Pixels, by: int) -> Pixels:
    """Means of by × by pixels; what is left over at the edges is dropped."""
    count, height, width, _ = frames.shape
    if by == 1 or min(height, width) < 2 * by:
        return frames
    h, w = height // by, width // by
    cut = frames[:, : h * by, : w * by].reshape(count, h, by, w, by, 3)
    found: Pixels = (cut.mean((2, 4)) + 0.5).astype(np.uint8)
    return found
