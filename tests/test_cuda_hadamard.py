"""Rotations on chip, in Triton's interpreter and in plain torch, against vdq_export.hadamard's matrices in float64."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from vdq_export import hadamard
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels import _hadamard as kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

# (order, blocks of a row): powers of two below and above 16, padded Paley orders, one, two and three factors
ORDERS = [(2, 3), (4, 5), (8, 1), (16, 3), (32, 1), (64, 2), (256, 3), (512, 1), (12, 3), (20, 1), (24, 7), (28, 1),
          (36, 2), (40, 1), (108, 1), (192, 3), (384, 1), (1536, 1), (4096, 1), (5120, 1)]  # fmt: skip
MODEL_WIDTHS = (1152, 1536, 2048, 3072, 4608, 5120, 8960, 9216, 12288, 13824)


def rotated(x: Array, order: int, transpose: bool = False) -> Array:
    h = hadamard.matrix(order).astype(np.float64)
    return (x.astype(np.float64).reshape(-1, order) @ (h.T if transpose else h)).reshape(x.shape)


def rows(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32))


def error(got: torch.Tensor, want: Array) -> float:
    """The largest, as a share of the root mean square: a rotation mixes all of a block, so that is its own size."""
    return float(np.abs(got.double().numpy() - want).max() / np.sqrt(np.square(want).mean()))


@pytest.mark.parametrize(("order", "count"), ORDERS)
@pytest.mark.parametrize("transpose", [False, True])
def test_float32_is_turned_to_its_own_precision(order: int, count: int, transpose: bool) -> None:
    """Three bfloat16 numbers hold 24 bits, and sums of n terms lose a few: 3e-6 is 25 times 2^-23."""
    x = rows(3, order * count)
    want = rotated(x.numpy(), order, transpose)
    assert error(kernel.launch(x, order, transpose=transpose, dtype=torch.float32), want) < 3e-6
    assert error(kernel.reference(x, order, transpose=transpose), want) < 3e-6


def test_the_other_transpose_is_told_apart() -> None:
    x = rows(2, 36)
    assert error(kernel.launch(x, 12, dtype=torch.float32), rotated(x.numpy(), 12, transpose=True)) > 0.1


def test_back_again() -> None:
    x = rows(2, 192)
    there = kernel.launch(x, 192, dtype=torch.float32)
    assert error(kernel.launch(there, 192, transpose=True, dtype=torch.float32), x.double().numpy()) < 3e-6


@pytest.mark.parametrize(("terms", "most"), [(1, 2.0**-8), (2, 2.0**-16), (3, 2.0**-22)])
def test_each_bfloat16_term_adds_eight_bits(terms: int, most: float) -> None:
    """Each rounds what is left to within 2^-8 of it, 2^-8 / √3 on the average at most; two factors: √2 times that.

    The third is of float32's own precision: sums of 12 and 16 numbers lose two bits of it.
    """
    x = rows(8, 192)
    want = rotated(x.numpy(), 192)
    off = kernel.launch(x, 192, dtype=torch.float32, config={"TERMS": terms}).double().numpy() - want
    found = float(np.sqrt(np.square(off).mean() / np.square(want).mean()))
    assert found < most
    assert terms == 3 or found > most / 8, "one term more or less would be seen"


def test_bfloat16_needs_one_term_in_its_first_product() -> None:
    """Exact there, as ±1 is: only the rounding of the result remains, half a step of 2^-8."""
    x = rows(5, 64).bfloat16()
    want = rotated(x.float().numpy(), 64)
    assert np.all(np.abs(kernel.launch(x, 64, dtype=torch.bfloat16).double().numpy() - want) <= np.abs(want) * 2.0**-8)


@pytest.mark.parametrize(("tall", "count"), [(16, 1), (1, 16), (4, 8)])
def test_any_tile_gives_the_same(tall: int, count: int) -> None:
    """Rows that are no multiple of a tile's, and more blocks to a tile than a row has."""
    x, config = rows(7, 60), {"BLOCK_M": tall, "COUNT": count}
    assert error(kernel.launch(x, 20, dtype=torch.float32, config=config), rotated(x.numpy(), 20)) < 3e-6


def test_rows_may_lie_apart() -> None:
    x = rows(4, 64)[:, 8:32]
    assert not x.is_contiguous()
    assert error(kernel.launch(x, 24, dtype=torch.float32), rotated(x.numpy(), 24)) < 3e-6


def test_no_rows() -> None:
    assert kernel.transform(rows(0, 24), 24).shape == (0, 24)


def test_transform_takes_triton_where_it_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(kernel, "launch", lambda x, order, **_: seen.append(order))
    kernel.transform(rows(1, 24), 24)
    assert seen == []
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    kernel.transform(rows(1, 24), 24)
    assert seen == [24]


def test_blocks_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 12 do not divide 25 channels"):
        kernel.transform(rows(1, 25), 12)


def test_unknown_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="92"):
        kernel.shape(92)


def test_every_order_has_a_tile() -> None:
    """A ⊗ B ⊗ C makes the block, padded to powers of two that tl.dot takes."""
    for order in filter(hadamard.is_order, range(2, 4097)):
        made = kernel.shape(order)
        assert made.left * made.b * made.c == made.width == max(order, 16 if order & (order - 1) == 0 else 0)
        for n in (made.a, made.b, made.c):
            assert n == 1 or (n >= 16 and n & (n - 1) == 0)
        assert made.left <= made.a < 2 * max(made.left, 8)


def test_factors_multiply_to_the_matrix() -> None:
    for order in (24, 192, 512, 4096, 1280):
        made, device = kernel.shape(order), torch.device("cpu")
        signs = np.ones((1, 1))
        for one, n in zip(kernel.constants(order, device), (made.left, made.b, made.c), strict=True):
            signs = signs if one is None else np.kron(signs, one.float().numpy()[:n, :n])
        assert np.array_equal(signs, np.sign(hadamard.matrix(order)))


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_models_widths_fit_one_tile(width: int) -> None:
    """The largest block of each, in the shared memory of the H100; 256 × 256 does not fit that of smaller ones."""
    order = hadamard.largest_block(width)
    with _config.assume("sm_90"):
        assert kernel.fits(order)
    with _config.assume("sm_89"):
        assert kernel.fits(order) is (width != 8960)
