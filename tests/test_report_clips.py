"""Clips as pictures on the report page: exact while they are small, and within bytes, time and memory when not."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from vdq_export.drawing.pixels import pixels
from vdq_export.metrics import psnr_db
from vdq_export.report import sprites
from vdq_export.report.content import ClipPair


def pair(frames: int = 3, height: int = 4, width: int = 6, seed: int = 0) -> ClipPair:
    rng = np.random.default_rng(seed)
    reference, quantized = rng.random((2, 3, frames, height, width))
    return ClipPair.of("a", reference, 0.9 * reference + 0.1 * quantized)


def picture(panel: sprites.Panel) -> np.ndarray:
    data = base64.b64decode(panel.address.partition(";base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def size(strip: sprites.Strip) -> int:
    return sum(len(panel.address) for panel in strip.panels)


def test_clips_are_in_their_pictures_frame_by_frame() -> None:
    clip = pair()
    (strip,) = sprites.strips([clip])
    exact, other, difference = (picture(panel) for panel in strip.panels)
    assert (strip.frames, strip.shrunk, strip.exact, exact.shape) == (3, 1, True, (4, 18, 3))
    assert np.array_equal(exact[:, 6:12], clip.reference[1])
    assert np.array_equal(other[:, 12:], clip.quantized[2])
    apart = 4 * np.abs(clip.reference.astype(int) - clip.quantized)
    assert np.array_equal(difference[:, :6], apart[0]) and apart.max() > 4
    (beside,) = sprites.strips([clip], [pair(seed=1)], "w4a4")
    assert [panel.title.partition(",")[0] for panel in beside.panels[3:]] == ["w4a4", "difference of w4a4 ×4"]
    assert len(sprites.strips([clip], [pair(frames=2)])[0].panels) == 3, "of another length: not beside"


def test_large_clips_lose_exactness_first_and_then_size() -> None:
    clip = pair(frames=4, height=64, width=64)
    (exact,) = sprites.strips([clip])
    (lossy,) = sprites.strips([clip], budget=size(exact) * 2 // 3)
    (small,) = sprites.strips([clip], budget=size(exact) // 6)
    assert [(one.shrunk, one.exact) for one in (exact, lossy, small)] == [(1, True), (1, False), (2, False)]
    assert size(lossy) <= size(exact) * 2 // 3 and size(small) <= size(exact) // 6
    assert small.panels[0].address.startswith("data:image/webp;") and picture(small.panels[0]).shape == (32, 128, 3)
    quarters = clip.reference[0].reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(picture(small.panels[0])[:, :32].mean((0, 1)) - quarters.mean((0, 1))).max() < 2
    long = pair(frames=3, height=2, width=sprites.WIDEST // 2)
    assert [panel.columns for panel in sprites.strips([long])[0].panels] == [2, 2, 2]


def test_a_real_video_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying sizes on whole clips took minutes; each size is tried on one frame of each side."""
    encoded: list[int] = []
    plain = sprites._Size.address

    def counted(self: sprites._Size, sheet: np.ndarray) -> str:
        encoded.append(sheet.shape[0] * sheet.shape[1])
        return plain(self, sheet)

    monkeypatch.setattr(sprites._Size, "address", counted)
    frame = np.random.default_rng(0).integers(0, 256, (480, 832, 3), np.uint8)
    reference = np.stack([np.roll(frame, 7 * number, 1) for number in range(49)])
    clip = ClipPair("a", reference, reference ^ 3, 30.0)
    budget = 1_000_000
    (strip,) = sprites.strips([clip], budget=budget)
    assert strip.shrunk > 1 and size(strip) <= 1.1 * budget
    shown = sum(strip.frames * panel.width * panel.height for panel in strip.panels)
    whole_frames = (sum(encoded) - shown) / (480 * 832)
    assert whole_frames <= 3 * (1 + np.pi**2 / 6) + 0.5, "PNG, and WebP at 1, 1/4, 1/9 …, of three sides"


def test_a_picture_is_small_enough_for_every_browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips without much in them would fit into the bytes at any size."""
    monkeypatch.setattr(sprites, "AREA", 100_000)
    grey = np.full((20, 48, 83, 3), 128, np.uint8)
    (strip,) = sprites.strips([ClipPair("a", grey, grey, 99.0)])
    assert sum(strip.frames * panel.width * panel.height for panel in strip.panels) <= 100_000
    monkeypatch.undo()
    wide = np.zeros((2, 48, 48 * 832, 3), np.uint8)
    (strip,) = sprites.strips([ClipPair("48 channels", wide, wide, 99.0)])
    assert (strip.shrunk, strip.panels[0].columns) == (3, 1)
    line = np.zeros((2, 1, sprites.WIDEST + 1, 3), np.uint8)
    assert picture(sprites.strips([ClipPair("a line", line, line, 99.0)])[0].panels[0]).shape[1] == line.shape[2]


def test_a_grey_clip_and_one_that_is_no_number_are_pictures_too() -> None:
    clip = ClipPair.of("a", np.full((1, 2, 2, 2), 0.5), np.full((1, 2, 2, 2), np.nan))
    assert clip.reference.shape == (2, 2, 2, 3) and set(clip.reference.flat) == {128}
    assert clip.psnr_db == -200.0 and set(clip.quantized.flat) == {0}


def test_psnr_in_pieces_is_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.random.default_rng(1).random((2, 3, 5, 7, 11), np.float32)
    expected = 10 * np.log10(1 / np.mean((first.astype(float) - second) ** 2))
    monkeypatch.setattr("vdq_export.metrics.PIECE", 100)
    assert psnr_db(first, second) == pytest.approx(expected, rel=1e-12)
    assert pixels(first).shape == (5, 7, 11, 3)
