"""Metrics against hand-made numbers and scikit-image; the picture writer against its own input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from vdq_export import metrics
from vdq_export.drawing.clips import side_by_side

RNG = np.random.default_rng(3)
CLIP = RNG.random((1, 4, 16, 20))


def test_psnr_by_hand() -> None:
    # error 0.1 everywhere: mean square 0.01, so 20 dB at peak 1 and 6.02 dB more at peak 2
    assert metrics.psnr_db(CLIP, CLIP + 0.1) == pytest.approx(20, abs=1e-9)
    assert metrics.psnr_db(CLIP, CLIP + 0.1, peak=2) == pytest.approx(20 + 20 * np.log10(2), abs=1e-9)


def test_sqnr_by_hand() -> None:
    assert metrics.sqnr_db([3.0, 4.0], [3.0, 3.5]) == pytest.approx(20, abs=1e-9)  # 25 / 0.25
    assert metrics.sqnr_db([0.0], [1.0]) == -np.inf


def test_equal_inputs() -> None:
    assert metrics.psnr_db(CLIP, CLIP) == metrics.sqnr_db(CLIP, CLIP) == metrics.sqnr_db([0.0], [0.0]) == np.inf
    assert metrics.ssim(CLIP, CLIP) == pytest.approx(1, abs=1e-12)
    assert metrics.temporal_difference_error(CLIP, CLIP) == 0


@pytest.mark.parametrize("noise", [0.02, 0.2, 1.0])
def test_ssim_is_that_of_scikit_image(noise: float) -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    other = (CLIP + noise * RNG.standard_normal(CLIP.shape)).clip(0, 1)
    expected = [structural_similarity(a, b, win_size=7, data_range=1.0) for a, b in zip(CLIP[0], other[0], strict=True)]
    assert metrics.ssim(CLIP, other) == pytest.approx(np.mean(expected), abs=1e-10)
    assert metrics.ssim(CLIP, other) < 0.999


def test_temporal_error_sees_flicker_and_not_a_still_offset() -> None:
    flicker = CLIP.copy()
    flicker[:, 1::2] += 0.1
    assert metrics.temporal_difference_error(CLIP, CLIP + 0.1) == pytest.approx(0, abs=1e-12)
    assert metrics.temporal_difference_error(CLIP, flicker) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("metric", [metrics.psnr_db, metrics.sqnr_db, metrics.ssim, metrics.temporal_difference_error])
def test_unlike_shapes_are_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match="shape"):
        metric(CLIP, CLIP[:, :2])  # would broadcast silently if it were [:, :1]
    with pytest.raises(ValueError, match="shape"):
        metric(CLIP, CLIP[:, :1])


def test_small_frames_and_single_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="7 x 7"):
        metrics.ssim(CLIP[..., :6], CLIP[..., :6])
    with pytest.raises(ValueError, match="frames >= 2"):
        metrics.temporal_difference_error(CLIP[:, :1], CLIP[:, :1])


def test_side_by_side_shows_the_pixels(tmp_path: Path) -> None:
    black, grey = np.zeros((1, 3, 8, 8)), np.full((1, 3, 8, 8), 0.1)
    grey[0, 1] = 0  # the middle frame does not differ
    gif, png = side_by_side([black, black], [grey, grey], ["one", "two"], tmp_path / "new")
    sheet = np.asarray(Image.open(png))[..., 0]
    assert len(list(ImageSequence.Iterator(Image.open(gif)))) == 3
    # 0.1 is byte 26, four times 0.1 is byte 102; two rows of two such frames of 64 x 64 pixels each
    # (lettering is antialiased and adds a few pixels of any grey)
    for value in (26, 102):
        assert 2 * 2 * 64 * 64 <= (sheet == value).sum() <= 2 * 2 * 64 * 64 * 1.02


def test_side_by_side_takes_colour_and_refuses_odd_pairs(tmp_path: Path) -> None:
    colour = np.stack([np.full((2, 8, 8), level) for level in (1.0, 0.0, 0.5)])
    _, png = side_by_side([colour], [colour], ["red"], tmp_path, scale=1)
    pixels = np.asarray(Image.open(png)).reshape(-1, 3)
    assert (pixels == (255, 0, 128)).all(1).sum() == 2 * 2 * 64
    with pytest.raises(ValueError, match="red: clips of shape"):
        side_by_side([colour], [colour[:, :1]], ["red"], tmp_path)
    with pytest.raises(ValueError, match="2 labels"):
        side_by_side([colour], [colour], ["a", "b"], tmp_path)
