"""Clips as pictures: float | quantized | difference, as an animated GIF and a PNG contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vdq_export.drawing.pixels import Pixels, pixels
from vdq_export.metrics import psnr_db

DIFFERENCE_GAIN = 4
FRAME_MS = 180  # of the GIF
GAP, MARGIN = 4, 8  # pixels between frames, and around the sheet
INK, PAPER = (20, 20, 20), (250, 250, 250)


class Rendered(NamedTuple):
    """The two files `side_by_side` wrote."""

    gif: Path
    png: Path


def side_by_side(
    float_clips: Sequence[np.ndarray],
    other_clips: Sequence[np.ndarray],
    labels: Sequence[str],
    out_dir: Path,
    columns: tuple[str, str] = ("float", "quantized"),
    scale: int | None = None,
) -> Rendered:
    """Write side-by-side.gif and side-by-side.png into `out_dir` (made if missing).

    Clips are [C, F, H, W] in [0, 1], shown as pixels() does; each label names one pair; `columns` names the two sides.
    Pixels grow `scale` times (nearest), by default so that a frame is about 64 pixels high. The difference is
    |float − other| times DIFFERENCE_GAIN, clipped. Raises ValueError for unequal counts or shapes.
    """
    if not len(float_clips) == len(other_clips) == len(labels) or not labels:
        raise ValueError(f"{len(float_clips)} clips, {len(other_clips)} others, {len(labels)} labels")
    rows, titles = [], []
    for reference, other, label in zip(float_clips, other_clips, labels, strict=True):
        if reference.shape != other.shape:
            raise ValueError(f"{label}: clips of shape {reference.shape} and {other.shape}")
        factor = scale or max(1, round(64 / reference.shape[2]))
        difference = DIFFERENCE_GAIN * np.abs(reference.astype(np.float64) - other)
        rows.append([_frames(clip, factor) for clip in (reference, other, difference)])
        titles.append(f"{label}, {psnr_db(reference, other):.1f} dB")
    names = (*columns, f"difference x{DIFFERENCE_GAIN}")
    out_dir.mkdir(parents=True, exist_ok=True)
    rendered = Rendered(out_dir / "side-by-side.gif", out_dir / "side-by-side.png")
    frames = range(min(row[0].shape[0] for row in rows))
    movie = [_page([[clip[t : t + 1] for clip in row] for row in rows], titles, names) for t in frames]
    movie[0].save(rendered.gif, save_all=True, append_images=movie[1:], duration=FRAME_MS, loop=0, optimize=False)
    _page(rows, titles, names).save(rendered.png)
    return rendered


def _frames(clip: np.ndarray, factor: int) -> Pixels:
    """[C, F, H, W] in [0, 1] → [F, factor·H, factor·W, 3] bytes."""
    return pixels(clip).repeat(factor, 1).repeat(factor, 2)


def _page(rows: list[list[Pixels]], titles: list[str], names: Sequence[str]) -> Image.Image:
    """One picture: for each row its title, then its clips side by side, every clip its frames in a line."""
    font = ImageFont.load_default(size=12)
    line = 18
    width = [max(max(_line_width(row[c]) for row in rows), int(font.getlength(name))) for c, name in enumerate(names)]
    lefts = [MARGIN + sum(width[:c]) + 3 * GAP * c for c in range(len(names))]
    heights = [row[0].shape[1] for row in rows]
    total = max(lefts[-1] + width[-1], MARGIN + max(int(font.getlength(title)) for title in titles)) + MARGIN
    page = Image.new("RGB", (total, 2 * MARGIN + line + sum(heights) + len(rows) * (line + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    for left, name in zip(lefts, names, strict=True):
        draw.text((left, MARGIN), name, INK, font=font)
    top = MARGIN + line
    for row, title, height in zip(rows, titles, heights, strict=True):
        draw.text((MARGIN, top), title, INK, font=font)
        for left, clip in zip(lefts, row, strict=True):
            for t, frame in enumerate(clip):
                page.paste(Image.fromarray(frame), (left + t * (frame.shape[1] + GAP), top + line))
        top += line + height + GAP
    return page


def _line_width(clip: Pixels) -> int:
    frames, width = int(clip.shape[0]), int(clip.shape[2])
    return frames * (width + GAP) - GAP
