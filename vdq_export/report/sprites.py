"""Clips as pictures inside the page: the frames of one side in a row, as a picture in a data: address."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from vdq_export.drawing.pixels import Pixels
from vdq_export.report.content import ClipPair

DIFFERENCE_GAIN = 4
BUDGET = 5_000_000  # bytes of all pictures of a page; larger clips lose exactness first, then size
AREA = 64_000_000  # pixels of all pictures, which a browser holds at four bytes each
WIDEST = 16_383  # pixels of a picture's edge: what WebP has room for, and every browser draws
QUALITY = 90  # of pictures that are not exact: finer than the differences that one looks for
SHRUNK = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


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
    """One clip: what stands side by side. shrunk: pixels of the clip along one edge of a shown pixel.

    exact: whether the pixels are the clip's own, and not compressed with loss.
    """

    name: str
    frames: int
    shrunk: int
    exact: bool
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class _Side:
    """One panel before it is a picture: frame(i) is [H, W, 3] for i < frames."""

    title: str
    frames: int
    frame: Callable[[int], Pixels]


@dataclass(frozen=True)
class _Size:
    """How the pictures are made."""

    shrunk: int
    exact: bool

    def shown(self, frame: Pixels) -> Pixels:
        """Means of shrunk × shrunk pixels; what is left over at the edges is dropped."""
        height, width, _ = frame.shape
        by = self.shrunk
        if by == 1 or min(height, width) < 2 * by:
            return frame
        cut = frame[: height // by * by, : width // by * by].reshape(height // by, by, width // by, by, 3)
        found: Pixels = (cut.mean((1, 3), dtype=np.float32) + 0.5).astype(np.uint8)
        return found

    def address(self, sheet: Pixels) -> str:
        """The picture as a data: address."""
        file, kind = io.BytesIO(), "png" if self.exact or max(sheet.shape) > WIDEST else "webp"
        options: dict[str, dict[str, Any]] = {"png": {"optimize": True}, "webp": {"quality": QUALITY, "method": 2}}
        Image.fromarray(sheet).save(file, kind, **options[kind])
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def strips(
    clips: Sequence[ClipPair], others: Sequence[ClipPair] = (), against: str = "the other", budget: int = BUDGET
) -> tuple[Strip, ...]:
    """The clips as pictures of about `budget` bytes at most, all made alike: exact, or with loss, or smaller too.

    others: of the bundle `against`, that is compared with; those of equal name stand beside.
    """
    beside = {one.name: one for one in others}
    sides = [_sides(clip, beside.get(clip.name), against) for clip in clips]
    size = _fitting([side for clip in sides for side in clip], budget)
    made = []
    for clip, shown in zip(clips, sides, strict=True):
        panels = tuple(_panel(side, size) for side in shown)
        made.append(Strip(clip.name, len(clip.reference), size.shrunk, size.exact, panels))
    return tuple(made)


def _sides(clip: ClipPair, other: ClipPair | None, against: str) -> list[_Side]:
    frames = len(clip.reference)
    made = [
        _Side("float", frames, clip.reference.__getitem__),
        _Side(f"quantized, {clip.psnr_db:.1f} dB", frames, clip.quantized.__getitem__),
        _Side(f"difference ×{DIFFERENCE_GAIN}", frames, partial(_difference, clip)),
    ]
    if other is not None and other.quantized.shape == clip.reference.shape:
        made.append(_Side(f"{against}, {other.psnr_db:.1f} dB", frames, other.quantized.__getitem__))
        made.append(_Side(f"difference of {against} ×{DIFFERENCE_GAIN}", frames, partial(_difference, other)))
    return made


def _difference(clip: ClipPair, frame: int) -> Pixels:
    apart = np.abs(clip.reference[frame].astype(np.int16) - clip.quantized[frame]) * DIFFERENCE_GAIN
    found: Pixels = apart.clip(0, 255).astype(np.uint8)
    return found


def _fitting(sides: Sequence[_Side], budget: int) -> _Size:
    """The best one within the budget, judged by each side's middle frame; the smallest where none is."""
    middle = [(side.frames, side.frame(side.frames // 2)) for side in sides]
    sizes = [_Size(1, True), *(_Size(shrunk, False) for shrunk in SHRUNK)]
    for size in sizes:
        frames = [(count, size.shown(frame)) for count, frame in middle]
        area = sum(count * frame.shape[0] * frame.shape[1] for count, frame in frames)
        if area > AREA or max((edge for _, frame in frames for edge in frame.shape), default=0) > WIDEST:
            continue
        if sum(count * len(size.address(frame)) for count, frame in frames) <= budget:
            return size
    return sizes[-1]


def _panel(side: _Side, size: _Size) -> Panel:
    sheet, columns = _sheet((size.shown(side.frame(number)) for number in range(side.frames)), side.frames)
    rows = -(-side.frames // columns)
    return Panel(side.title, size.address(sheet), sheet.shape[1] // columns, sheet.shape[0] // rows, columns)


def _sheet(frames: Iterable[Pixels], count: int) -> tuple[Pixels, int]:
    """(all frames in one picture, frames in a row of it)"""
    sheet, columns = np.zeros((0, 0, 3), np.uint8), 1
    for number, frame in enumerate(frames):
        height, width, _ = frame.shape
        if number == 0:
            columns = max(1, min(count, WIDEST // width))
            sheet = np.zeros((-(-count // columns) * height, columns * width, 3), np.uint8)
        top, left = number // columns * height, number % columns * width
        sheet[top : top + height, left : left + width] = frame
    return sheet, columns
