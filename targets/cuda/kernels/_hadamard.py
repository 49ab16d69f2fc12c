"""x[M, K] · blockdiag(H, …, H) on chip, H[n, n] of vdq_export.hadamard: one read and one write of x.

H_n = A ⊗ B ⊗ C up to 1/√n; B and C are of Sylvester's kind, symmetric, of 16 rows or more; A holds what is not a power
of two (12, 20, 28 … times some twos) and is not symmetric. A block lies in a tile as v[A, B, C], so that

    v·H = (Aᵀ ⊗ Bᵀ ⊗ Cᵀ)·v:     v · C along the last axis, · B along the middle one, Aᵀ · along the first.

Each is a product with a small matrix of ±1 on the tensor cores, A + B + C products an element instead of n. Triton's
shapes are powers of two: A is padded by zeros to Ap, which costs Ap / A of the arithmetic, but no memory traffic.

    n      1536     5120       8960      13824      192      512
    A·B·C  24·1·64  20·16·16   140·1·64  108·1·128  12·1·16  1·16·32

±1 is exact in bfloat16. A float32 value is split into TERMS bfloat16 ones, each product summed in float32: two terms
err by 2^-16 of the value (three by 2^-24, like float32); rounding to bfloat16 alone errs by 2^-8. An x that is bfloat16
already needs one term in its first product, exactly.

Floor of x · H alone, bfloat16 in and out, 4 bytes an element at 4.3 TB/s, and of its products, two terms, at 400 T a
second (800 TFLOP/s, bfloat16 on tensor cores at best), M = 32760:

    K = n              1536     5120     8960    13824
    memory            47 µs   156 µs   273 µs   421 µs
    products          32 µs    86 µs   860 µs   686 µs

So 8960 in one block is bound by arithmetic: 140 does not factor and is padded to 256. Blocks of 1280 (20·64: 226 µs) or
256 (16·16: 47 µs) are far cheaper there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from vdq_export import hadamard
from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._backend import blocks, power_of_two, runs_triton
from vdq_export.targets.cuda.kernels._numbers import float_dot, narrow

LEAST = 16  # the shortest inner dimension of tl.dot
LARGEST = 32768  # elements of a tile: 64 registers a thread at 512 threads
_ELEMENTS = 4096  # of a tile that may choose
_TRANSPOSED = 24  # an exchange through shared memory costs about as much as so many products an element


@dataclass(frozen=True)
class Shape:
    """How blocks lie in a tile, as [a, b, c]: each has `width` columns, and zeros behind the first `left` of `a`."""

    order: int
    width: int
    left: int
    a: int
    b: int
    c: int

    @property
    def size(self) -> int:
        return self.a * self.b * self.c

    @property
    def least(self) -> int:
        """The fewest blocks of a tile: a product has 16 rows or more, a single factor's are those of other blocks."""
        return LEAST if self.size == max(self.a, self.c) else 1

    @property
    def cost(self) -> float:
        """Products an element, padding counted; what exchanges cost on top."""
        factors = [n for n in (self.a, self.b, self.c) if n > 1]
        return sum(factors) * self.a / self.left + _TRANSPOSED * (len(factors) - 1)


@lru_cache(maxsize=256)
def shape(order: int) -> Shape:
    """The cheapest. Raises ValueError for an order that is not known."""
    if not hadamard.is_order(order):
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    if order < LEAST and order & (order - 1) == 0:
        return Shape(order, LEAST, 1, 1, 1, LEAST)  # several blocks together: blockdiag(H, …, H) of 16 rows
    found = []
    left = base = min(
        order >> k for k in range(order.bit_length()) if order % (1 << k) == 0 and hadamard.is_order(order >> k)
    )
    while left <= order:
        if left == 1 or left >= LEAST or base > 1:
            a = 1 if left == 1 else power_of_two(left, LEAST)
            found += [Shape(order, order, left, a, b, c) for b, c in _pairs(order // left)]
        left *= 2
    return min(found, key=lambda one: (one.cost, one.size))


def _pairs(n: int) -> list[tuple[int, int]]:
    """(b, c) with b · c = n, each 1 or at least 16, b = 1 if either is."""
    powers = [1, *(1 << k for k in range(4, n.bit_length()))]
    return [(b, n // b) for b in powers if n // b in powers and (n // b > 1 or b == 1)]


@cache  # all of them: captured graphs read them where they lie
def constants(order: int, device: torch.device, transpose: bool = False) -> tuple[torch.Tensor | None, ...]:
    """A, B, C as signs in bfloat16, padded, on the device; None for a factor of one. transpose: those of Hᵀ.

    Made at a first call, which copies to the device: a call before a graph is captured has to have seen every order.
    """
    made = shape(order)
    if made.width > order:
        repeated = np.kron(np.eye(made.width // order, dtype=np.float32), np.sign(hadamard.matrix(order)))
        return None, None, torch.from_numpy(repeated).to(device, torch.bfloat16)
    left = np.sign(hadamard.matrix(made.left))
    padded = np.zeros((made.a, made.a), np.float32)
    padded[: made.left, : made.left] = left.T if transpose else left
    signs = (padded, *(np.sign(hadamard.matrix(n)) for n in (made.b, made.c)))
    return tuple(torch.from_numpy(one).to(device, torch.bfloat16) if len(one) > 1 else None for one in signs)


@triton.jit
def columns(chunk, COUNT: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr, A: tl.constexpr, REST: tl.constexpr):
    """(columns of x, whether there is one) of the places of a tile [COUNT, A, REST], the chunk-th of its rows."""
    place = tl.arange(0, COUNT * A * REST)
    a = (place // REST) % A
    block = chunk * COUNT + place // (A * REST)
    return block * WIDTH + a * REST + place % REST, a < LEFT


@triton.jit
def split_dot(v, right, TERMS: tl.constexpr):
    """v @ right, float32, v as a sum of TERMS bfloat16 matrices; right is bfloat16."""
    part = narrow(v, tl.bfloat16)
    product = float_dot(part, right, None)
    if TERMS > 1:
        v -= part.to(tl.float32)
        part = narrow(v, tl.bfloat16)
        product = float_dot(part, right, product)
    if TERMS > 2:
        v -= part.to(tl.float32)
        product = float_dot(narrow(v, tl.bfloat16), right, product)
    return product


@triton.jit
def _split_dot_left(left, v, TERMS: tl.constexpr):
    """left @ v, likewise."""
    part = narrow(v, tl.bfloat16)
    product = float_dot(left, part, None)
    if TERMS > 1:
        v -= part.to(tl.float32)
        part = narrow(v, tl.bfloat16)
        product = float_dot(left, part, product)
    if TERMS > 2:
        v -= part.to(tl.float32)
        product = float_dot(left, narrow(v, tl.bfloat16), product)
    return product


@triton.jit
def _square(matrix, N: tl.constexpr):
    i = tl.arange(0, N)
    return tl.load(matrix + i[:, None] * N + i[None, :])


@triton.jit
def _first_axis(v, a, T: tl.constexpr, A: tl.constexpr, REST: tl.constexpr, TERMS: tl.constexpr):
    """Aᵀ · along the middle axis of [T, A, REST]."""
    i = tl.arange(0, A)
    if T == 1:
        transposed = tl.load(a + i[None, :] * A + i[:, None])
        v = _split_dot_left(transposed, tl.reshape(v, (A, REST)), TERMS)
    else:
        v = tl.permute(tl.reshape(v, (T, A, REST)), (0, 2, 1))
        v = split_dot(tl.reshape(v, (T * REST, A)), _square(a, A), TERMS)
        v = tl.permute(tl.reshape(v, (T, REST, A)), (0, 2, 1))
    return v


@triton.jit
def rotate(
    v, a, b, c, scale,
    ROWS: tl.constexpr, COUNT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    TERMS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Each block of the float32 tile v[ROWS, COUNT · A · B · C] times H. scale: 1/√n. FIRST: terms of a first product.

    v is finite, and zero in the places that hold no column.
    """
    T: tl.constexpr = ROWS * COUNT
    if C > 1:
        v = split_dot(tl.reshape(v, (T * A * B, C)), _square(c, C), FIRST)
    if B > 1:
        v = tl.permute(tl.reshape(v, (T * A, B, C)), (0, 2, 1))
        v = split_dot(tl.reshape(v, (T * A * C, B)), _square(b, B), TERMS)
    if A > 1:
        v = _first_axis(v, a, T, A, B * C, TERMS if C > 1 else FIRST)
    if B > 1:
        v = tl.permute(tl.reshape(v, (T * A, C, B)), (0, 2, 1))
    return tl.reshape(v, (ROWS, COUNT * A * B * C)) * scale


@triton.jit
def _transform(
    x, y, m, k, stride, scale, a, b, c,
    BLOCK_M: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, LEFT: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, known = columns(tl.program_id(1), COUNT, WIDTH, LEFT, A, B * C)
    inside = (rows < m)[:, None] & (known & (cols < k))[None, :]
    at = rows[:, None].to(tl.int64) * stride + cols[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v = rotate(v, a, b, c, scale, BLOCK_M, COUNT, A, B, C, TERMS, FIRST)
    at = rows[:, None].to(tl.int64) * k + cols[None, :]
    tl.store(y + at, narrow(v, y.dtype.element_ty), mask=inside)


def tile(made: Shape, k: int, elements: int = _ELEMENTS, most: int = 0) -> tuple[int, int]:
    """(rows, blocks of a row) of a tile of about so many elements; `most` blocks a row, 0 for any number.

    A power of two that divides a row's blocks leaves no places empty, so that is what it takes of a row.
    """
    of_row = blocks(k, made.width)
    count = min(of_row & -of_row, max(1, elements // made.size), most or of_row)
    rows = max(1, elements // (count * made.size), blocks(made.least, count))
    return power_of_two(rows), count


def fits(order: int) -> bool:
    """Whether a block lies in one tile, and with its largest factor in the shared memory of the device."""
    if order <= 1:
        return True
    made = shape(order)
    shared = 2 * made.size + 2 * max(made.a, made.b, made.c) ** 2
    return made.size <= LARGEST and shared <= _config.SHARED[_config.arch()]


def warps(made: Shape, elements: int) -> int:
    """Of a tile. 16 leave 128 registers a thread, too few for sums of products of 128 × 128."""
    return 8 if made.size == elements and min(made.a, made.c) >= 128 else min(16, max(4, elements // 1024))


def terms(dtype: torch.dtype) -> int:
    """How many bfloat16 numbers stand for one whose result is kept in this type."""
    return 3 if dtype == torch.float32 else 2


def launch(
    x: torch.Tensor, order: int, *, transpose: bool = False, dtype: torch.dtype, config: dict[str, int] | None = None
) -> torch.Tensor:
    """As transform, in Triton. config: BLOCK_M rows, COUNT blocks of a row, num_warps, TERMS."""
    (m, k), made = x.shape, shape(order)
    y = torch.empty(m, k, dtype=dtype, device=x.device)
    if not m:
        return y
    rows, count = tile(made, k)
    config = config or {}
    rows, count = config.get("BLOCK_M", rows), config.get("COUNT", count)
    most = config.get("TERMS", terms(dtype))
    x = x if x.stride(1) == 1 else x.contiguous()
    a, b, c = constants(order, x.device, transpose)
    _transform[blocks(m, rows), blocks(blocks(k, made.width), count)](
        x, y, m, k, x.stride(0), order**-0.5, a, b, c,
        BLOCK_M=rows, COUNT=count, WIDTH=made.width, LEFT=made.left, A=made.a, B=made.b, C=made.c,
        TERMS=most, FIRST=1 if x.dtype == torch.bfloat16 else most,
        num_warps=config.get("num_warps", warps(made, rows * count * made.size)), enable_fp_fusion=True,
    )  # fmt: skip
    return y


def reference(x: torch.Tensor, order: int, *, transpose: bool = False) -> torch.Tensor:
    """x[..., K] · blockdiag(H, …, H), or its transpose, in plain torch, float32."""
    if order <= 1:
        return x.float()
    left, right = _factors(order, x.device)
    if transpose:
        left, right = left.T, right.T
    turned = x.float().reshape(-1, len(left), len(right)) @ right
    return (left.T @ turned).reshape(x.shape)


@lru_cache(maxsize=64)
def _factors(order: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = (torch.from_numpy(np.array(one)).to(device) for one in hadamard.factors(order))
    return left, right


def transform(
    x: torch.Tensor, order: int, *, transpose: bool = False, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """x[M, K] · blockdiag(H, …, H), H[order, order], order dividing K; transpose: times Hᵀ, which undoes it."""
    if x.shape[1] % order:
        raise ValueError(f"blocks of {order} do not divide {x.shape[1]} channels")
    if order > 1 and runs_triton(x) and fits(order):
        return launch(x, order, transpose=transpose, dtype=dtype)
    return reference(x, order, transpose=transpose).to(dtype)
