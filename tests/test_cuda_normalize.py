"""The row kernel in Triton's interpreter, and what it is in plain torch, against its definition in numpy's float64."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from vdq_export import hadamard
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import normalize as kernel
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels.normalize import Steps

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

FLAT = {"BLOCK_M": 2, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}  # rows in parts: 16 channels at a time
# Float32: sums and products of some hundred numbers, exponentials good to 2 ulp. As a share of the largest value.
EXACT = 1e-5


def defined(x: torch.Tensor, steps: Steps) -> Array:
    """v, before it is quantized or kept."""
    v = x.double().numpy()
    if steps.norm == "layer":
        v = v - v.mean(1, keepdims=True)
    if steps.norm != "none":
        v = v / np.sqrt(np.square(v).mean(1, keepdims=True) + steps.epsilon)
    v = v * vector(steps.weight, 1.0) + vector(steps.bias, 0.0)
    v = ACTIVATIONS[steps.act](v)
    v = v * rows_of(steps.scale, len(v), 1.0) + rows_of(steps.shift, len(v), 0.0)
    v = v * vector(steps.smooth, 1.0)
    if steps.hadamard > 1:
        blocks = v.reshape(-1, steps.hadamard) @ hadamard.matrix(steps.hadamard).astype(np.float64)
        v = blocks.reshape(v.shape)
    return np.asarray(v * vector(steps.post, 1.0))


ACTIVATIONS = {
    "none": lambda v: v,
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "gelu_erf": lambda v: 0.5 * v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))),
}


def vector(one: torch.Tensor | None, absent: float) -> Array:
    return np.asarray(absent) if one is None else one.double().numpy()


def rows_of(one: torch.Tensor | None, m: int, absent: float) -> Array:
    return np.asarray(absent) if one is None else one.double().numpy()[np.arange(m) // (m // len(one))]


def check(x: torch.Tensor, steps: Steps, config: dict[str, int] | None = None) -> None:
    """Both forms against the definition: y and low to float32's precision or dtype's, codes to half a step."""
    v = defined(x, steps)
    size = np.abs(v).max(initial=1e-30)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[steps.dtype]
    for y, q, low in (kernel.launch(x, steps, config=config), kernel.reference(x, steps)):
        assert (y is not None, q is not None, low is not None) == (steps.keep, steps.quant is not None, steps.rank > 0)
        if y is not None:
            assert y.dtype == steps.dtype
            within(y, v, EXACT * size + rounding * np.abs(v))
        if q is not None and steps.quant is not None:
            check_codes(q, v, steps.quant, EXACT * size)
        if low is not None and steps.down is not None:
            down = steps.down.double().numpy()
            # a sum of K products, each as exact as v: as a share of the sum of their sizes
            within(low, v @ down, EXACT * (np.abs(v) @ np.abs(down)) + rounding * np.abs(v @ down))


def within(got: torch.Tensor, want: Array, most: Array) -> None:
    off = np.abs(got.double().numpy() - want)
    assert got.shape == want.shape
    assert np.all(off <= most), f"off by {off.max()} where {np.broadcast_to(most, off.shape).flat[off.argmax()]} may be"


def check_codes(q: torch.Tensor, v: Array, quant: Quant, slack: float) -> None:
    """What a code stands for is within half a step of the value, or of the last level; float8: half its own step."""
    assert q.dtype == quant.dtype
    scale = float(quant.scale)
    if quant.dtype == FLOAT8:
        wanted = np.clip(v / scale, -448, 448)
        within(q.float(), wanted, np.maximum(np.abs(wanted) * 2.0**-4, 2.0**-10) + slack / scale)
        return
    zero = 0.0 if quant.zero is None else float(quant.zero)
    wanted = np.clip(v / scale + zero, quant.low, quant.high)
    within(q, wanted, np.full(v.shape, 0.5 + slack / scale))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def codes(zero: float | None = 3.0, low: int = -128, high: int = 127, scale: float = 0.03) -> Quant:
    return Quant(torch.tensor(scale), None if zero is None else torch.tensor([zero]), low, high)


def full(k: int, samples: int = 1, rank: int = 0, **changes: object) -> Steps:
    """Steps that use every operand."""
    steps = Steps(
        norm="layer", weight=normal(k, seed=1), bias=normal(k, seed=2), act="gelu_tanh",
        scale=normal(samples, k, seed=3), shift=normal(samples, k, seed=4), smooth=normal(k, seed=5).abs() + 0.5,
        post=normal(k, seed=6).abs() + 0.5, quant=codes(), down=normal(k, rank, seed=7) if rank else None,
        dtype=torch.float32,
    )  # fmt: skip
    return replace(steps, **changes)


@pytest.mark.parametrize("norm", kernel.NORMS)
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_norms_and_activations(norm: str, act: str) -> None:
    check(normal(5, 37), full(37, norm=norm, act=act))


@pytest.mark.parametrize("k", [1, 2, 16, 53, 257, 1536])
@pytest.mark.parametrize("norm", kernel.NORMS)
def test_widths_odd_and_prime(norm: str, k: int) -> None:
    """In the table's tiles; the widest in three parts."""
    check(normal(3, k), full(k, norm=norm, act="none"))


@pytest.mark.parametrize("norm", kernel.NORMS)
@pytest.mark.parametrize("m", [1, 5, 16])
def test_rows_in_parts(norm: str, m: int) -> None:
    """Tiles that divide neither the rows nor the 53 channels: statistics put together from four parts."""
    check(normal(m, 53), full(53, norm=norm), config=FLAT)


@pytest.mark.parametrize("config", [None, FLAT])
def test_a_mean_far_from_zero_does_not_cancel(config: dict[str, int] | None) -> None:
    """Mean 1000, deviation 1: sums of squares would lose 20 bits. Of float32's 24, x itself has lost 10."""
    x = normal(4, 53) + 1000.0
    y = kernel.launch(x, Steps(norm="layer", dtype=torch.float32), config=config)[0]
    assert y is not None
    within(y, defined(x, Steps(norm="layer")), np.full((4, 53), 2e-4))


def test_epsilon_stands_in_the_root() -> None:
    for norm in ("layer", "rms"):
        check(normal(3, 20) * 1e-2, Steps(norm=norm, epsilon=1e-3, dtype=torch.float32))


@pytest.mark.parametrize("config", [None, FLAT, FLAT | {"BLOCK_M": 4}])
@pytest.mark.parametrize("samples", [1, 2, 3, 6])
def test_rows_belong_to_samples(samples: int, config: dict[str, int] | None) -> None:
    """Tiles of rows of one sample, of several, and of one row each; the last tile is not full."""
    check(normal(6, 21), full(21, samples), config=config)


def test_one_row_of_scales_serves_all_samples() -> None:
    check(normal(6, 21), full(21, 3, scale=normal(1, 21)))


@pytest.mark.parametrize(("order", "k"), [
    (1, 7), (2, 6), (12, 36), (20, 60), (24, 24), (64, 192), (192, 576), (1536, 1536), (16, 48),
])  # fmt: skip
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_rotations(norm: str, order: int, k: int) -> None:
    check(normal(3, k), full(k, norm=norm, hadamard=order, act="none"))


@pytest.mark.parametrize("order", [4, 20])
@pytest.mark.parametrize("norm", kernel.NORMS)
def test_rotations_of_rows_in_parts(norm: str, order: int) -> None:
    check(normal(5, 60), full(60, norm=norm, hadamard=order), config=FLAT)


def test_a_rotation_of_bfloat16_is_not_rounded_before_it() -> None:
    """x is bfloat16, but what is rotated is x · smooth: two terms, 2^-16. One alone would be off by 2^-8."""
    x = normal(4, 64).bfloat16()
    steps = Steps(hadamard=64, smooth=normal(64).abs(), quant=codes(None, scale=2.0**-9), keep=False)
    q = kernel.launch(x, steps)[1]
    assert q is not None
    v = np.clip(defined(x, steps) * 2.0**9, -128, 127)
    within(q, v, np.full(v.shape, 0.5 + 512 * 2.0**-16 * 8))


@pytest.mark.parametrize("rank", [1, 5, 16, 40])
@pytest.mark.parametrize("norm", kernel.NORMS)
def test_low_rank(norm: str, rank: int) -> None:
    check(normal(21, 37), full(37, rank=rank, norm=norm))
    check(normal(5, 37), full(37, rank=rank, norm=norm, keep=False), config=FLAT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_rank_in_sixteen_bits(dtype: torch.dtype) -> None:
    """`down` is exact; v is two bfloat16 numbers: below the rounding of the result, which is all that is allowed."""
    check(normal(5, 70).to(dtype), full(70, rank=8, down=normal(70, 8).to(dtype), dtype=dtype))


def test_float16_down_has_all_its_bits() -> None:
    """x of one channel each, powers of two: low is `down`, eleven bits of it."""
    down = (1 + torch.arange(1024.0) / 1024).half().reshape(32, 32)
    low = kernel.launch(torch.eye(32), Steps(down=down, keep=False, dtype=torch.float32))[2]
    assert low is not None and torch.equal(low, down.float())


@pytest.mark.parametrize(("order", "k"), [(12, 36), (192, 192), (1536, 1536)])
def test_low_rank_behind_a_rotation(order: int, k: int) -> None:
    """The widest is too large for a tile of 16 rows: `down` is rotated instead."""
    check(normal(3, k), full(k, rank=4, hadamard=order, norm="rms", act="none"))
    check(normal(3, k), full(k, rank=4, hadamard=order, quant=None, keep=False, post=None))


def test_only_what_is_asked_for_is_made() -> None:
    x = normal(3, 20)
    for keep in (False, True):
        for quant in (None, codes()):
            for rank in (0, 3):
                check(x, full(20, rank=rank, keep=keep, quant=quant))


def test_ties_go_to_even() -> None:
    """Steps of 1/8: exact in float32. −128.5 … 127.5 and a zero of 1, clipped to both ends."""
    halves = torch.arange(-130, 131).float() + 0.5
    x = (halves / 8).repeat(2, 1)
    wanted = np.clip(np.rint(halves.numpy()) + 1, -128, 127)
    steps = Steps(quant=codes(1.0, scale=0.125), keep=False)
    for q in (kernel.launch(x, steps)[1], kernel.launch(x, steps, config=FLAT)[1], kernel.reference(x, steps)[1]):
        assert q is not None
        assert np.array_equal(q.numpy(), np.stack([wanted, wanted]))


def test_few_levels() -> None:
    """Four bits, asymmetric: codes −128 … −113."""
    check(normal(4, 33), full(33, quant=codes(-120.0, -128, -113, 0.4)))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_float8(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As a type, and as bits where the device has no such type."""
    monkeypatch.setattr(kernel._config, "capability", lambda: capability)
    check(normal(4, 33), full(33, quant=Quant(torch.tensor(0.01), dtype=FLOAT8)))
    x = torch.tensor([[1e4, -1e4, 464.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 0.0]])
    q = kernel.launch(x, Steps(quant=Quant(torch.tensor(1.0), dtype=FLOAT8), keep=False))[1]
    assert q is not None
    assert q.float().tolist() == [[448.0, -448.0, 448.0, 16.0, 20.0, 0.0, 2.0**-8, 0.0]], "ties to even, no infinity"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_in_and_out(dtype: torch.dtype) -> None:
    check(normal(5, 48).to(dtype), full(48, hadamard=12, dtype=dtype, weight=normal(48).to(dtype)))


def test_scales_that_are_views_of_one_row() -> None:
    row = torch.tensor([9.0, 0.05, 9.0, -4.0])
    check(normal(3, 20), full(20, quant=Quant(row[1], row[3:])))


def test_rows_may_lie_apart() -> None:
    x = normal(4, 60)[:, 7:44]
    assert not x.is_contiguous()
    check(x, full(37))
    check(x.T, full(4))


@pytest.mark.parametrize("order", [0, 12])
def test_no_rows(order: int) -> None:
    check(normal(0, 24), full(24, rank=2, hadamard=order))


def test_triton_only_where_it_is_forced_and_can(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    launch = kernel.launch

    def seen(x: torch.Tensor, steps: Steps) -> kernel.Outputs:
        taken.append(steps.hadamard)
        return launch(x, steps)

    monkeypatch.setattr(kernel, "launch", seen)
    x = normal(2, 24)
    kernel.normalize(x, hadamard=12)
    assert taken == []
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    y, q, low = kernel.normalize(x, hadamard=12, quant=codes(), keep=False)
    assert (taken, y, low) == ([12], None, None)
    expected = kernel.reference(x, Steps(hadamard=12, quant=codes()))[1]
    assert q is not None and expected is not None and torch.equal(q, expected)
    kernel.normalize(x, down=normal(24, 300))
    monkeypatch.setattr(kernel._hadamard, "fits", lambda order: False)
    kernel.normalize(x, hadamard=12)
    assert taken == [12], "neither 300 columns nor a block beyond shared memory"


@pytest.mark.parametrize(
    "wrong",
    [{"weight": normal(1)}, {"smooth": normal(1)}, {"post": normal(15)}, {"down": normal(15, 2)},
     {"scale": normal(3, 16)}, {"scale": normal(2, 16), "shift": normal(4, 16)}],
    ids=["weight", "smooth", "post", "down", "samples", "shift"],
)  # fmt: skip
def test_operands_of_another_size_are_refused(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"is \[|samples"):
        kernel.normalize(normal(4, 16), **wrong)


def test_blocks_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 12 do not divide 25 channels"):
        kernel.normalize(normal(1, 25), hadamard=12)
