"""Hadamard matrices against their definition: widths 1, odd, prime, 12·2^k; transposes: Paley's are not symmetric."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdq_export import hadamard
from vdq_export.graph import Array

KNOWN = [n for n in range(1, 301) if hadamard.is_order(n)]
# Sums of up to 2·150 products in float32, against the largest of the result: a few hundred half units of 6e-8.
EXACT = 1e-5


def signs(n: int) -> Array:
    """√n · H, which must be ±1 to float32's precision: one rounding of 1/√n and one here."""
    scaled = hadamard.matrix(n).astype(np.float64) * n**0.5
    assert np.abs(np.abs(scaled) - 1).max() < 1e-6
    return np.rint(scaled)


def by_definition(x: Array, block: int) -> Array:
    """x · blockdiag(H, …), summed in float64."""
    whole = np.kron(np.eye(x.shape[-1] // block), hadamard.matrix(block).astype(np.float64))
    return np.asarray(x.astype(np.float64) @ whole)


def difference(actual: Array, expected: Array) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("n", KNOWN)
def test_rows_are_orthogonal_exactly(n: int) -> None:
    made = signs(n)
    assert made.shape == (n, n)
    assert np.array_equal(made @ made.T, n * np.eye(n))
    assert hadamard.matrix(n).dtype == np.float32


def test_orders() -> None:
    """1, 2 and all multiples of 4 but those that Paley does not give (OEIS A046116)."""
    missing = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}
    assert set(KNOWN) == {1, 2, *range(4, 301, 4)} - missing
    assert all(hadamard.is_order(base * 2**k) for base in (12, 20, 28, 36, 40, 44, 52, 60, 108, 140) for k in range(8))
    for n in (0, -4, 3, 6, 18, 92, 116):
        assert not hadamard.is_order(n)
        with pytest.raises(ValueError, match=str(n)):
            hadamard.matrix(n)


@pytest.mark.parametrize("q", [11, 19, 43, 59])
def test_paley_of_a_prime_is_the_textbooks(q: int) -> None:
    """I + [[0, 1], [−1, Q]], Q[a, b] by Euler's criterion for a − b."""
    expected = np.eye(q + 1)
    expected[0, 1:], expected[1:, 0] = 1, -1
    for a in range(q):
        for b in range(q):
            if a != b:
                expected[a + 1, b + 1] = 1 if pow(a - b, (q - 1) // 2, q) == 1 else -1
    assert np.array_equal(signs(q + 1), expected)
    assert not np.array_equal(expected, expected.T)


@pytest.mark.parametrize(("p", "m"), [(3, 3), (5, 2), (7, 2), (3, 4), (11, 1)])
def test_powers_go_through_the_whole_field(p: int, m: int) -> None:
    powers = hadamard._powers(p, m)
    assert len(set(powers)) == p**m - 1
    assert (0,) * m not in powers


def test_doubling_is_sylvesters() -> None:
    two = np.array([[1, 1], [1, -1]])
    for n in (1, 2, 12, 24, 36):
        assert np.array_equal(signs(2 * n), np.kron(signs(n), two))


@pytest.mark.parametrize("n", [1, 2, 12, 128, 144, 192, 256, 280, 1536])
def test_factors_make_the_matrix_and_are_small(n: int) -> None:
    left, right = hadamard.factors(n)
    assert difference(np.kron(left, right), hadamard.matrix(n)) < 1e-6
    assert len(left) * len(right) == n
    assert len(left) == 1 if n <= 128 else len(left) + len(right) < n
    with pytest.raises(ValueError, match="read-only"):
        right[0, 0] = 0.0


@pytest.mark.parametrize(
    ("width", "block"),
    [(1, 1), (2, 2), (7, 1), (13, 1), (97, 1), (6, 2), (26, 2), (12, 12), (24, 24), (36, 36), (192, 192), (1536, 1536),
     (70, 2), (92, 4), (100, 100), (5120, 5120), (8960, 8960), (13824, 13824), (4 * 23 * 3, 276), (4 * 47, 4)],
)  # fmt: skip
def test_largest_block(width: int, block: int) -> None:
    assert hadamard.largest_block(width) == block


@given(st.integers(1, 600), st.integers(0, 130))
def test_largest_block_by_trying_all(width: int, most: int) -> None:
    orders = [n for n in range(1, (most or width) + 1) if width % n == 0 and hadamard.is_order(n)]
    assert hadamard.largest_block(width, most) == max(orders)


@given(st.sampled_from(KNOWN), st.integers(1, 3), st.sampled_from([(), (1,), (3,), (2, 5)]), st.integers(0, 9))
def test_rotate_is_the_product_by_definition(block: int, blocks: int, lead: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*lead, block * blocks)).astype(np.float32)
    turned = hadamard.rotate(x, block)
    assert turned.dtype == np.float32
    assert turned.shape == x.shape
    assert difference(turned, by_definition(x, block)) < EXACT
    assert np.array_equal(hadamard.rotate(np.asfortranarray(x), block), turned)


@given(st.sampled_from(KNOWN), st.integers(1, 3), st.sampled_from([1, 2, 7]), st.integers(0, 9))
def test_unrotated_rows_undo_it(block: int, blocks: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(block * blocks, columns)).astype(np.float32)
    turned = hadamard.unrotate_rows(weight, block)
    assert turned.dtype == np.float32
    whole = np.kron(np.eye(blocks), hadamard.matrix(block).astype(np.float64))
    assert difference(turned, whole.T @ weight) < EXACT
    x = rng.normal(size=(4, block * blocks)).astype(np.float32)
    expected = x.astype(np.float64) @ weight
    largest = np.abs(x).max() * np.abs(weight).sum(axis=0).max()  # sums may cancel: relative to what is summed
    assert np.abs(hadamard.rotate(x, block) @ turned - expected).max() < EXACT * largest


@pytest.mark.parametrize("block", [12, 20, 28, 192])
def test_a_transposed_rotation_is_caught(block: int) -> None:
    """The comparisons above see H where Hᵀ belongs."""
    rng = np.random.default_rng(block)
    weight = rng.normal(size=(block, 5)).astype(np.float32)
    wrong = hadamard.matrix(block) @ weight
    assert difference(wrong, hadamard.matrix(block).T.astype(np.float64) @ weight) > 1000 * EXACT
    x = rng.normal(size=(3, block)).astype(np.float32)
    assert difference(x @ hadamard.matrix(block).T, by_definition(x, block)) > 1000 * EXACT


def test_an_outlier_is_spread_evenly() -> None:
    """What it is for: one large channel becomes the same magnitude in all of its block."""
    x = np.zeros((1, 24), np.float32)
    x[0, 3] = 12.0
    turned = hadamard.rotate(x, 12)[0]
    assert np.allclose(np.abs(turned[:12]), 12**0.5, rtol=1e-6)
    assert not turned[12:].any()
