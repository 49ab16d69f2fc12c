"""Orthonormal Hadamard matrices: H[n, n] with entries ±1/√n, Hᵀ·H = I. Most are not symmetric, so transposes matter.

Orders 1, 2 and m·2^k, built and not tabled:
    H_2n   = H_n ⊗ [[1, 1], [1, −1]]                                        Sylvester
    H_q+1  = I + [[0, 1], [−1, Q]]                    q = 3 modulo 4         Paley I
    H_2q+2 = C ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]],
             C = [[0, 1], [1, Q]]                     q = 1 modulo 4         Paley II
with Q[a, b] = χ(a − b) over the field of q elements, q a prime power, χ = 1 for squares, −1 for the others, χ(0) = 0.
The first of m·4, m·8, m·16 … that Paley gives is doubled; none up to 2048 known, the order is not (92, 116, 156 …).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np

from vdq_export.graph import Array

_SMALL = 128  # up to here one product with H[n, n] is quicker than one with each of two factors
_LARGEST_PALEY = 2048  # beyond, one row of the matrix costs more than what it spares


def matrix(n: int) -> Array:
    """H[n, n], float32. Raises ValueError for an order that is not known."""
    base = _base(n)
    if base is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    signs = _paley(base)
    while len(signs) < n:
        signs = np.kron(signs, _TWO)
    return signs.astype(np.float32) / np.float32(n**0.5)


@lru_cache(maxsize=64)
def factors(n: int) -> tuple[Array, Array]:
    """(A[p, p], B[q, q]) with H_n = A ⊗ B and the least p + q; p is 1 for small n. Read-only.

    x·H_n is Aᵀ·X·B of x written as X[p, q]: p + q products an element instead of p·q.
    """
    base = _base(n) or n
    q = (
        n
        if n <= _SMALL
        else min((2**k for k in range(n.bit_length()) if n % (base * 2**k) == 0), key=lambda q: q + n // q)
    )
    made = matrix(n // q), matrix(q)
    for one in made:
        one.flags.writeable = False
    return made


def is_order(n: int) -> bool:
    return _base(n) is not None


def largest_block(width: int, most: int = 0) -> int:
    """The largest known order that divides `width`, and is at most `most` unless that is 0; 1 for an odd width."""
    orders = range(min(width, most or width), 1, -1)
    return next((n for n in orders if width % n == 0 and is_order(n)), 1)


def rotate(x: Array, block: int) -> Array:
    """x[..., K] · blockdiag(H, …, H) with K / block equal blocks. float32 in, float32 out."""
    left, right = factors(block)
    p, q = len(left), len(right)
    turned: Array = np.ascontiguousarray(x).reshape(-1, q) @ right.astype(x.dtype, copy=False)
    if p > 1:
        turned = left.T.astype(x.dtype, copy=False) @ turned.reshape(-1, p, q)
    return turned.reshape(x.shape)


def unrotate_rows(weight: Array, block: int) -> Array:
    """blockdiag(H, …, H)ᵀ · weight[K, N]: what makes up for a rotated input."""
    return rotate(weight.T, block).T


_TWO = np.array([[1, 1], [1, -1]], np.int8)


@lru_cache(maxsize=1024)
def _base(n: int) -> int | None:
    """The order that is doubled to reach n, or None."""
    if n < 1:
        return None
    if n & (n - 1) == 0:
        return 1
    order = 4 * (n // (n & -n))  # four times the odd part
    while n % order == 0 and order <= _LARGEST_PALEY:
        if _paley_field(order):
            return order
        order *= 2
    return None


def _paley_field(order: int) -> int:
    """q of the construction that gives this order, 0 for none."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and _prime_power(q):
            return q
    return 0


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, m) with q = p^m, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    m, rest = 0, q
    while rest % p == 0:
        m, rest = m + 1, rest // p
    return (p, m) if rest == 1 else None


def _paley(order: int) -> Array:
    """Signs [order, order]; order 1 for the powers of two."""
    if order == 1:
        return np.ones((1, 1), np.int8)
    q = _paley_field(order)
    core = np.zeros((q + 1, q + 1), np.int8)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1 if q % 4 == 1 else -1, _jacobsthal(q)
    unit = np.eye(q + 1, dtype=np.int8)
    if q % 4 == 3:
        return unit + core
    return np.asarray(np.kron(core, _TWO) + np.kron(unit, np.array([[1, -1], [-1, -1]], np.int8)))


def _jacobsthal(q: int) -> Array:
    """Q[a, b] = χ(a − b); elements are numbers whose p-adic digits are the coefficients of a polynomial."""
    p, m = _prime_power(q) or (q, 1)
    weights = p ** np.arange(m)
    digits = np.arange(q)[:, None] // weights % p
    powers = np.array(_powers(p, m)) @ weights
    character = np.zeros(q, np.int8)
    character[powers[0::2]], character[powers[1::2]] = 1, -1  # squares are the even powers of a generator
    difference = sum((np.subtract.outer(d, d) % p) * w for d, w in zip(digits.T, weights, strict=True))
    return np.asarray(character[difference])


def _powers(p: int, m: int) -> list[tuple[int, ...]]:
    """1, g, g² … g^(q−2): all elements but 0, as coefficients, lowest first, of polynomials modulo a primitive one."""
    for tail in product(range(p), repeat=m):  # x^m = tail[0] + tail[1]·x + …
        power = one = (1, *[0] * (m - 1))
        found = []
        for _ in range(p**m - 1):
            found.append(power)
            carry, power = power[-1], (0, *power[:-1])
            power = tuple((a + carry * t) % p for a, t in zip(power, tail, strict=True))
            if power == one or not any(power):
                break
        if power == one and len(found) == p**m - 1:
            return found
    raise AssertionError(f"every field has a generator, that of {p**m} elements too")
