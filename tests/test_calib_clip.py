"""Clip ratios: the search finds the output's optimum and takes it only where held-out rows and known extremes agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vdq_export.calib import clip
from vdq_export.calib.clip import Branch, search
from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.ranges import Grid, affine, fake_quantize
from vdq_export.plan import Dynamic, Range

Array = np.ndarray[Any, Any]
RATIOS = (0.6, 0.7, 0.8, 0.9, 1.0)
FOUR, EIGHT = Grid("uint4", 4), Grid("uint8", 8)


def covering(lo: float, hi: float, grid: Grid) -> Range:
    scale, zero = affine(lo, hi, grid)
    return Range(lo=lo, hi=hi, scale=scale, zero_point=zero, why="min and max of 9 rows")


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounded(weight: Array, qmax: int = 7) -> Array:
    step = np.abs(weight).max(axis=0) / qmax
    return np.asarray(np.rint(weight / step) * step, np.float32)


def static(
    rows: list[Array],
    ranges: list[Range],
    grid: Grid,
    weight: Array,
    quantized: Array | None = None,
    branch: Branch = None,
) -> tuple[Range, ...]:
    """What search() makes of the ranges of one layer."""
    found, none = search(
        rows, ranges, (), grid, [weight], [weight if quantized is None else quantized], [branch], RATIOS
    )
    assert none == ()
    return found


def ratio(found: Range, given: Range) -> float:
    return (found.hi - found.lo) / (given.hi - given.lo)


# -- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [0.6, 0.7, 0.9])
def test_finds_the_range_whose_grid_the_values_lie_on(best: float) -> None:
    """Error zero at one ratio, in each bin another; both ends shrink toward zero, which stays on the grid."""
    ranges = [covering(-1.0, 3.0, FOUR), covering(-5.0, 2.0, FOUR)]
    narrow = [covering(r.lo * k, r.hi * k, FOUR) for r, k in zip(ranges, (best, 0.8), strict=True)]
    levels = np.random.default_rng(0).integers(0, 16, (2, 200, 48))
    rows = [
        (r.scale * (q - r.zero_point)).astype(np.float32)
        for r, q in zip(narrow, levels.astype(np.float64), strict=True)
    ]
    found = static(rows, ranges, FOUR, normal(48, 20))
    for one, wanted in zip(found, narrow, strict=True):
        assert (one.lo, one.hi, one.scale, one.zero_point) == (wanted.lo, wanted.hi, wanted.scale, wanted.zero_point)
    assert found[0].why.startswith(f"clip ratio {best:g} of min and max of 9 rows: held-out output error ")


def brute_force(rows: Array, given: Range, layers: list[tuple[Array, Array, Branch]]) -> dict[float, float]:
    """Output error at each ratio, layer by layer, from the definition."""
    errors = {}
    for one in RATIOS:
        scale, zero = affine(given.lo * one, given.hi * one, FOUR)
        x = fake_quantize(rows, scale, zero, FOUR)
        outputs = [x @ q + (0 if b is None else rows @ b[0] @ b[1]) - rows @ w for w, q, b in layers]
        errors[one] = float(sum(np.square(y).sum() for y in outputs))
    return errors


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [40, 700])
def test_takes_the_least_output_error_over_all_layers(seed: int, width: int) -> None:
    """Two layers, one with a low-rank branch, against their definition; 700 output channels go through the sketch."""
    rows = np.random.default_rng(seed).standard_t(5, (1200, 64)).astype(np.float32)
    rows[:, seed] *= 3
    given = covering(float(rows.min()), float(rows.max()), FOUR)
    first, second = normal(64, width // 2, seed=seed + 10), normal(64, width // 2, seed=seed + 20)
    branch = (normal(64, 3, seed=seed), normal(3, width // 2, seed=seed))
    layers: list[tuple[Array, Array, Branch]] = [
        (first, rounded(first), None),
        (second, rounded(second - branch[0] @ branch[1]), branch),
    ]
    weights, quantized, branches = zip(*layers, strict=True)
    (found,), _ = search([rows], [given], (), FOUR, weights, quantized, branches, RATIOS)
    errors = brute_force(rows, given, layers)
    # 2 %: the search saw half of the rows; √(2/256) = 9 % noise of the sketch is common to all ratios
    assert errors[round(ratio(found, given), 3)] <= 1.02 * min(errors.values())
    assert errors[1.0] > 1.2 * min(errors.values()), "the case is no test otherwise"


@pytest.mark.parametrize("seed", range(6))
def test_sketch_picks_what_all_columns_pick(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a few output channels carry most of the error, of which a subset of columns sees none or all."""
    rows = np.random.default_rng(seed).laplace(size=(500, 96)).astype(np.float32)
    weight = normal(96, 1000, seed=seed)
    weight[:, :5] *= 30
    weight[: 40 + seed, :5] = 0
    given = covering(float(rows.min()), float(rows.max()), FOUR)
    sketched = static([rows], [given], FOUR, weight, rounded(weight))[0]
    monkeypatch.setattr(clip, "SKETCH", 1000)
    exact = static([rows], [given], FOUR, weight, rounded(weight))[0]
    assert (sketched.lo, sketched.hi) == (exact.lo, exact.hi)


def test_sketched_error_is_the_error() -> None:
    weight, error = normal(32, 2000), normal(100, 32, seed=1)
    exact = np.square(error @ weight).sum()
    found = np.square(error @ clip._sketch([weight], [weight], [None]).quantized).sum()
    assert found == pytest.approx(exact, rel=3 * np.sqrt(2 / clip.SKETCH))  # three standard deviations at least


def test_low_rank_branch_counts() -> None:
    """An outlier channel that the branch carries may be clipped; one in the quantized weight may not."""
    rows = normal(600, 64)
    rows[:, 0] *= 6
    weight = normal(64, 30, seed=1)
    weight[0] *= 8
    down = np.eye(64, dtype=np.float32)[:, :1]
    residual = weight.copy()
    residual[0] = 0
    given = covering(float(rows.min()), float(rows.max()), FOUR)
    carried = static([rows], [given], FOUR, weight, residual, (down, weight[:1]))[0]
    alone = static([rows], [given], FOUR, weight, weight)[0]
    assert ratio(carried, given) == pytest.approx(0.6) and ratio(alone, given) >= 0.8
    forgotten = static([rows], [given], FOUR, weight, residual, None)[0]  # planted: the branch left out
    assert forgotten.lo == given.lo, "then the missing part of the output hides what clipping gains"


# -- when nothing is taken -------------------------------------------------------------------------------------------


def test_missed_extremes_keep_the_full_range_at_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample lies inside an eighth of the range; every 150th token has one value at its end."""
    rng = np.random.default_rng(0)
    tokens = rng.uniform(-1, 1, (30_000, 32)).astype(np.float32)
    sample = tokens[:256].copy()
    tokens[300::150, 5] = np.where(rng.integers(0, 2, len(tokens[300::150])), 8, -8)
    given, weight = covering(-8, 8, EIGHT), normal(32, 24)

    def loss(one: Range) -> float:
        x = fake_quantize(tokens, one.scale, one.zero_point, EIGHT)
        return float(np.square((x - tokens) @ weight).sum())

    kept = static([sample], [given], EIGHT, weight)[0]
    assert (kept.lo, kept.hi) == (given.lo, given.hi)
    assert kept.why == "min and max of 9 rows; no clip ratio of 0.9, 0.8, 0.7, 0.6 gains"
    monkeypatch.setattr(clip, "MISSED", 0.0)
    trapped = static([sample], [given], EIGHT, weight)[0]
    assert loss(trapped) > 5 * loss(kept), "planted: a search that believes its sample walks into the trap"


def test_four_bits_clip_in_spite_of_missed_extremes() -> None:
    """The same sample at 4 bits: what clipping gains outweighs all that so many rows can have missed."""
    sample = np.random.default_rng(0).uniform(-1, 1, (256, 32)).astype(np.float32)
    assert static([sample], [covering(-8, 8, FOUR)], FOUR, normal(32, 24))[0].hi < 8


def test_held_out_rows_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one half are small, those of the other fill the range: a gain on one half alone is none."""
    rows = np.random.default_rng(0).uniform(-1, 1, (400, 32)).astype(np.float32)
    rows[::2] *= 0.55
    rows[1::2] /= np.abs(rows[1::2]) ** 0.95  # close to -1 and 1
    given = covering(-1, 1, FOUR)
    kept = static([rows], [given], FOUR, normal(32, 24))[0]
    assert (kept.lo, kept.hi) == (-1, 1) and "clip ratio 0.6 gains too little: held-out output error" in kept.why
    monkeypatch.setattr(clip, "GAIN", np.inf)
    assert static([rows], [given], FOUR, normal(32, 24))[0].hi == pytest.approx(0.6), "planted: no second look"


def test_equal_rows_stay_in_one_half() -> None:
    tokens = normal(9, 20)
    rows = tokens[np.random.default_rng(0).integers(0, 9, 300)]
    first, second = clip._halves(rows)
    assert len(first) + len(second) == 300
    assert not {r.tobytes() for r in first} & {r.tobytes() for r in second}
    same = clip._halves(np.repeat(tokens[:1], 5, axis=0))
    assert len(same[0]) == len(same[1]) == 5, "a single token has no second half"


@pytest.mark.parametrize("rows", [np.zeros((20, 8), np.float32), normal(20, 8)[:1]])
def test_nothing_to_gain(rows: Array) -> None:
    given = covering(float(rows.min()), float(rows.max()), EIGHT)
    found = static([rows], [given], EIGHT, normal(8, 4))[0]
    assert found.scale > 0 and found.hi == given.hi


def test_no_ratio_below_one_tries_none() -> None:
    ranges, none = (covering(-1, 1, FOUR),), ()
    assert search([normal(9, 8)], ranges, none, FOUR, [normal(8, 4)], [normal(8, 4)], [None], (1.0,)) == (ranges, none)


def test_no_more_rows_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def counting(rows: Array, how: Range | Dynamic, grid: Grid) -> Array:
        nonlocal seen
        seen += len(rows)
        return quantize_rows(rows, how, grid)

    monkeypatch.setattr(clip, "quantize_rows", counting)
    static([normal(5000, 4), normal(5000, 4, seed=1)], [covering(-4, 4, FOUR)] * 2, FOUR, normal(4, 3))
    # half of the rows with five ratios, the other half with two at most
    assert seen <= clip.TOKENS * (5 + 2) / 2


# -- scales computed at run time -------------------------------------------------------------------------------------


def dynamic(rows: Array, kind: Any, grid: Grid = FOUR) -> Dynamic:
    weight = normal(rows.shape[1], 24)
    given = Dynamic(kind=kind, why="at run time")
    none, (found,) = search([rows], (), (given,), grid, [weight], [weight], [None], RATIOS)
    assert none == ()
    return found


def test_token_ratio() -> None:
    """Every row has two values beyond a grid that fits the other 398 exactly at 0.7 of it."""
    levels = np.random.default_rng(0).integers(-5, 6, (300, 400)).astype(np.float32)
    levels[:, 0], levels[:, 1] = 10 / 0.7, -5 / 0.7
    found = dynamic(levels * np.geomspace(0.1, 10, 300, dtype=np.float32)[:, None], "token")
    assert found.ratio == 0.7 and found.why.startswith("clip ratio 0.7 of at run time: held-out output error")


def test_mx_exponent_moves_where_the_floor_saturates() -> None:
    """Blocks whose largest value is just below a power of two: the standard's exponent covers three quarters of it."""
    numbers = np.array([0, 1, 2, 3, 4, 6, 7.9], np.float32)
    rng = np.random.default_rng(0)
    rows = rng.choice(numbers, (300, 64)) * rng.choice([-1, 1], (300, 64)).astype(np.float32)
    rows[:, ::32] = 7.9
    found = dynamic(rows.astype(np.float32), "mx")
    assert (found.ratio, found.offset) == (1.0, 1)
    assert found.why.startswith("clip ratio 1, exponent +1 of at run time")


def test_channel_scales_are_left_alone() -> None:
    assert dynamic(normal(50, 32), "channel") == Dynamic(kind="channel", why="at run time")
