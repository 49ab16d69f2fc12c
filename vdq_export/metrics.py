"""How far two clips or tensors are apart, in numpy. Clips are [..., F, H, W]; decibels of equal inputs are infinite."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

WINDOW = 7  # pixels of the SSIM window's edge
K1, K2 = 0.01, 0.03
PIECE = 1 << 20  # values that are looked at together
LIMIT_DB = 200.0  # stands for "no difference at all" where a number has to be finite


def psnr_db(a: ArrayLike, b: ArrayLike, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio 10·log10(peak² / mean((a−b)²)) over all values. ValueError for unlike shapes."""
    x, y = np.asarray(a), np.asarray(b)
    if x.shape != y.shape or not x.size:
        raise ValueError(f"cannot compare shapes {x.shape} and {y.shape}")
    # In pieces: a clip of 81 frames of 480p would take 2.3 GB as doubles.
    x, y = x.reshape(-1), y.reshape(-1)
    pieces = (slice(start, start + PIECE) for start in range(0, x.size, PIECE))
    noise = sum(float(np.square(np.subtract(x[one], y[one], dtype=np.float64)).sum()) for one in pieces)
    return decibels(peak**2, noise / x.size)


def sqnr_db(reference: ArrayLike, other: ArrayLike) -> float:
    """Signal-to-quantization-noise ratio 10·log10(Σ reference² / Σ (reference−other)²).

    Equal tensors, all zeros too, give infinity. Raises ValueError for unlike shapes.
    """
    x, y = _pair(reference, other)
    return decibels(float(np.sum(x**2)), float(np.sum((x - y) ** 2)))


def ssim(a: ArrayLike, b: ArrayLike, peak: float = 1.0) -> float:
    """Mean structural similarity over all frames [..., H, W], 1 for equal ones.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    Trans. Image Processing 13(4), 2004, equation 13, with a uniform WINDOW x WINDOW window and unbiased (co)variances;
    only windows that lie inside the frame count. Raises ValueError for unlike shapes or frames below WINDOW pixels.
    """
    x, y = _pair(a, b)
    if x.ndim < 2 or min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"frames of shape {x.shape[-2:]}: need at least {WINDOW} x {WINDOW} pixels")
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_x = unbiased * (_window_mean(x * x) - mean_x**2)
    var_y = unbiased * (_window_mean(y * y) - mean_y**2)
    covariance = unbiased * (_window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    return float(similarity.mean())


def temporal_difference_error(a: ArrayLike, b: ArrayLike) -> float:
    """Mean |Δa − Δb|, Δ the difference of successive frames: flicker that one frame does not show, 0 for equal motion.

    Raises ValueError for unlike shapes or fewer than two frames.
    """
    x, y = _pair(a, b)
    if x.ndim < 3 or x.shape[-3] < 2:
        raise ValueError(f"shape {x.shape}: need [..., frames >= 2, height, width]")
    return float(np.abs(np.diff(x, axis=-3) - np.diff(y, axis=-3)).mean())


def relative_change(now: ArrayLike, before: ArrayLike) -> float:
    """‖now − before‖₁ / ‖before‖₁. Arrays of different shapes have changed infinitely, zeros to zeros not at all."""
    x, y = np.asarray(now), np.asarray(before)
    if x.shape != y.shape:
        return float("inf")
    moved = float(np.abs(np.subtract(x, y, dtype=np.result_type(x, y, np.float32))).sum(dtype=np.float64))
    size = float(np.abs(y).sum(dtype=np.float64))
    return moved / size if size else (0.0 if moved == 0 else float("inf"))


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or not x.size:
        raise ValueError(f"cannot compare shapes {x.shape} and {y.shape}")
    return x, y


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) of two powers: +inf without noise, -inf without signal."""
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def bounded_sqnr_db(reference: ArrayLike, other: ArrayLike) -> float:
    """sqnr_db within ±LIMIT_DB, for JSON, which has no infinity; -LIMIT_DB when `other` holds NaN."""
    return bounded(sqnr_db(reference, other))


def bounded(found_db: float) -> float:
    """Decibels within ±LIMIT_DB; -LIMIT_DB for NaN."""
    return -LIMIT_DB if np.isnan(found_db) else float(np.clip(found_db, -LIMIT_DB, LIMIT_DB))


def db_text(found_db: float | None, threshold_db: float | None = None) -> str:
    """For people: "41.2 dB". Near a threshold with as many digits as tell on which side of it the number is."""
    if found_db is None:
        return "not measured"
    if found_db >= LIMIT_DB:
        return "no difference"
    text = ""
    for digits in range(1, 7):
        text = f"{found_db:.{digits}f}"
        if threshold_db is None or (float(text) < threshold_db) == (found_db < threshold_db):
            break
    return f"{text} dB"


def _window_mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., H-6, W-6] mean of each WINDOW x WINDOW window."""
    windows = np.lib.stride_tricks.sliding_window_view(x, (WINDOW, WINDOW), axis=(-2, -1))
    means: NDArray[np.float64] = windows.mean((-2, -1))
    return means
