"""Low-rank branches: Eckart and Young hold, the randomised SVD is next to it, ranks spend a budget where it helps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import calib_cases as cases
from vdq_export.calib import low_rank
from vdq_export.calib.low_rank import Spectrum, Split, choose_ranks, ranks, spectrum, split
from vdq_export.graph import Array
from vdq_export.recipe import LowRankRecipe

# float32 products of sizes up to 300: 300 · 2^-24 is 2e-5 at worst, 1e-6 for random signs; errors are shares of ‖W‖.
TOLERANCE = 1e-5
SIDES = (1, 2, 7, 13, 24, 96)


def matrix(k: int, n: int, seed: int = 0, decay: float = 1.0) -> Array:
    """Random singular vectors, σ_i = decay^i."""
    rng = np.random.default_rng(seed)
    side = min(k, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, side)))[0] for size in (k, n))
    return ((u * decay ** np.arange(side)) @ v.T).astype(np.float32)


def least_error(weight: Array, rank: int) -> float:
    """What Eckart and Young say no pair of this rank can go below."""
    sigma = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    return float(np.sqrt((sigma[rank:] ** 2).sum() / (sigma**2).sum()))


def excess(weight: Array, found: Split, rank: int) -> float:
    """How much more of ‖W‖ a branch leaves than the best of its rank; measured from its factors, not from its word."""
    assert found.down.shape == (weight.shape[0], rank)
    assert found.up.shape == (rank, weight.shape[1])
    left = weight - found.down.astype(np.float64) @ found.up.astype(np.float64)
    return float(np.linalg.norm(left) / np.linalg.norm(weight)) - least_error(weight, rank)


@given(st.sampled_from(SIDES), st.sampled_from(SIDES), st.integers(1, 12), st.integers(0, 9))
def test_no_pair_of_the_rank_is_better(k: int, n: int, rank: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    found, real = split(weight, rank), min(rank, k, n)
    assert abs(excess(weight, found, real)) <= TOLERANCE
    assert abs(found.error - least_error(weight, real)) <= TOLERANCE


def broken(kind: str, found: Split, weight: Array) -> Split:
    if kind == "next singular value":
        u, sigma, vt = np.linalg.svd(weight, full_matrices=False)
        part = slice(1, 1 + found.down.shape[1])
        return found._replace(down=u[:, part] * sigma[part], up=vt[part])
    if kind == "unscaled":
        return found._replace(down=found.down / np.linalg.norm(found.down, axis=0))
    if kind == "sign":
        return found._replace(up=-found.up)
    return found._replace(up=found.up[::-1].copy())


@pytest.mark.parametrize("kind", ["next singular value", "unscaled", "sign", "order of the rows"])
def test_wrong_branches_are_seen(kind: str) -> None:
    weight = matrix(24, 13, decay=0.7)
    assert excess(weight, broken(kind, split(weight, 4), weight), 4) > 100 * TOLERANCE


@pytest.mark.parametrize(("k", "n"), [(600, 300), (300, 600)])
@pytest.mark.parametrize(("decay", "slack"), [(0.9, 1e-5), (0.99, 2e-3), (1.0, 1e-5)])
def test_randomised_svd_is_next_to_the_best(k: int, n: int, decay: float, slack: float) -> None:
    """A power iteration squares the ratio of singular values twice. Where they are nearly equal it cannot tell them
    apart, but then any is as good: with all equal a random subspace is the best, and 0.99 is about the worst between:
    16 ranks hold 1 − 0.99^32 = 27 % of it, of which a tenth missed would leave sqrt(0.76) − sqrt(0.73) = 2 %
    more; it has to miss less than a hundredth."""
    weight = matrix(k, n, decay=decay)
    assert not low_rank.is_exact((k, n), 16)
    found = split(weight, 16)
    assert excess(weight, found, 16) <= slack
    assert abs(found.error - least_error(weight, 16) - excess(weight, found, 16)) <= TOLERANCE
    again = split(weight, 16)
    assert np.array_equal(found.down, again.down)
    assert np.array_equal(found.up, again.up)


def test_factors_share_the_singular_values_and_zeros_are_no_error() -> None:
    found = split(matrix(30, 20, decay=0.5), 5)
    assert np.allclose(np.linalg.norm(found.down, axis=0), np.linalg.norm(found.up, axis=1), rtol=1e-5)
    nothing = split(np.zeros((5, 3), np.float32), 2)
    assert nothing.error == 0.0
    assert not (nothing.down @ nothing.up).any()


def test_rank_is_at_most_the_smaller_side() -> None:
    found = split(matrix(5, 3), 16)
    assert found.down.shape == (5, 3)
    assert found.error <= TOLERANCE


# -- budgets ---------------------------------------------------------------------------------------------------------


def left(spectra: list[Spectrum], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(1 - float(one.gains[:rank].sum()) for one, rank in zip(spectra, chosen, strict=True))


@given(st.integers(0, 200), st.integers(0, 60))
def test_greedy_ranks_against_all_choices(seed: int, allowed: int) -> None:
    rng = np.random.default_rng(seed)
    spectra = []
    for _ in range(3):
        gains = np.sort(rng.random(4))[::-1]
        spectra.append(Spectrum((int(rng.integers(1, 6)), int(rng.integers(1, 6))), gains / gains.sum()))

    def cost(chosen: tuple[int, ...] | list[int]) -> int:
        return sum(one.cost * rank for one, rank in zip(spectra, chosen, strict=True))

    found = ranks(spectra, allowed)
    assert cost(found) <= allowed
    choices = [c for c in itertools.product(range(5), repeat=3) if cost(c) <= allowed]
    best = min(left(spectra, c) for c in choices)
    missed = [one.gains[rank] for one, rank in zip(spectra, found, strict=True) if rank < 4]
    # Knapsack's bound: what is lost is less than the gain of the first step that did not fit.
    assert left(spectra, found) <= best + max([0.0, *(float(one.gains[0]) for one in spectra)]) * bool(missed) + 1e-12
    if not missed or all(one.cost == spectra[0].cost for one in spectra):
        assert left(spectra, found) <= best + 1e-12  # equal costs: every step fits or none does, greedy is optimal


def test_budget_goes_where_a_rank_takes_most_error_off() -> None:
    steep, flat = (spectrum(matrix(40, 40, decay=decay)) for decay in (0.5, 0.999))
    found = ranks([steep, flat], 8 * 80)
    # Gains of `steep`: 0.75, 0.19, 0.047, 0.012 …; of `flat`: each about 1 / 40.
    assert found == [3, 5]
    assert np.isclose(steep.gains[0], 1 - split(matrix(40, 40, decay=0.5), 1).error ** 2, atol=1e-6)


def test_choose_ranks_follows_patterns_and_budget() -> None:
    linears = cases.graph().linears()
    assert choose_ranks(linears, LowRankRecipe()) == {}
    fixed = choose_ranks(linears, LowRankRecipe(rank=3, match=("attn.to_q", "context", "time")))
    assert fixed == {"attn.to_q": 3, "context": 3, "time": 1}
    size = sum(k * n for k, n in (x.shape for x in linears))
    for budget in (0.1, 0.3, 0.6):
        found = choose_ranks(linears, LowRankRecipe(budget=budget, match=("attn.*",)))
        spent = sum(found[x.name] * sum(x.shape) for x in linears if x.name in found)
        assert set(found) <= {x.name for x in linears if x.name.startswith("attn.")}
        assert spent <= budget * size
        assert spent > budget * size - 2 * max(sum(x.shape) for x in linears) or budget == 0.6
