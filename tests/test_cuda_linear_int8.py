"""W8A8 linears of the CUDA target: plain torch and the Triton kernel in the interpreter, each against numpy.

Integer sums are held to be exact: with scales of one, float32 results below 2^24 are the integers themselves. What
follows them is held to tests/cuda_epilogue.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.cuda_epilogue import ALL, MIXED, OUTPUTS, Mix, check, epilogue_of
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import _backend, linear_int8
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import ACTIVATIONS, Epilogue, quantize
from vdq_export.targets.cuda.kernels._quant import Quant
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.linear import linear

TINY: Config = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2, "TMA": 0,
    "PERSISTENT": 0, "PART_N": 16,
}  # fmt: skip
ENGINE: Config = {**TINY, "TMA": 1}
PERSISTENT: Config = {**ENGINE, "PERSISTENT": 1}
SHAPES = [(1, 1, 1), (17, 33, 31), (16, 32, 32), (40, 24, 80), (5, 70, 48), (33, 40, 7)]


@dataclass
class Case:
    """Operands of one linear, of full-range codes."""

    m: int
    n: int
    k: int
    group: int = 0
    zero: float | None = -57.0
    seed: int = 0
    ones: bool = False

    def __post_init__(self) -> None:
        made = np.random.default_rng(self.seed)
        self.x = made.integers(-128, 128, (self.m, self.k)).astype(np.int8)
        self.w = made.integers(-128, 128, (self.k, self.n)).astype(np.int8)
        rows = -(-self.k // self.group) if self.group else 1
        scale = np.ones((rows, self.n)) if self.ones else made.uniform(0.5, 1.5, (rows, self.n)) / 127
        self.scale = scale.astype(np.float32)
        self.x_scale = np.float32(1 if self.ones else 0.02)
        self.weight = Weight.prepare(torch.from_numpy(self.w), torch.from_numpy(self.scale), self.group, "int8", "cpu")

    def operands(self) -> tuple[torch.Tensor, Weight, torch.Tensor, torch.Tensor | None]:
        zero = None if self.zero is None else torch.tensor([self.zero])
        return torch.from_numpy(self.x), self.weight, torch.tensor(self.x_scale), zero

    def product(self) -> Array:
        """y before the epilogue, float64."""
        shifted = self.x.astype(np.int64) - int(self.zero or 0)
        if not self.group:
            return (shifted @ self.w.astype(np.int64)) * np.float64(self.x_scale * self.scale[0])
        values = self.w * np.repeat(self.scale.astype(np.float64), self.group, 0)[: self.k]
        return np.asarray((shifted @ values) * self.x_scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [TINY, ENGINE, PERSISTENT], ids=["pointers", "engine", "persistent"])
@pytest.mark.parametrize("zero", [None, -128.0, 127.0])
def test_sums_are_exact(shape: tuple[int, int, int], config: Config, zero: float | None) -> None:
    case = Case(*shape, zero=zero, ones=True)
    expected = case.product()
    assert np.abs(expected).max() < 2**24
    epilogue = Epilogue(dtype=torch.float32)
    for y, _ in (
        linear_int8.launch(*case.operands(), epilogue, config),
        linear_int8.reference(*case.operands(), epilogue),
    ):
        assert y is not None
        assert np.array_equal(y.double().numpy(), expected)


def test_sums_of_extreme_codes_are_exact() -> None:
    """All codes −128, zero 127: −255·−128 each, the largest sums there are."""
    case = Case(16, 32, 96, zero=127.0, ones=True)
    case.x[:], case.w[:] = -128, -128
    case.weight = Weight.prepare(torch.from_numpy(case.w), torch.ones(32), 0, "int8", "cpu")
    y, _ = linear_int8.launch(*case.operands(), Epilogue(dtype=torch.float32), TINY)
    assert y is not None
    assert (y == 96 * 255 * 128).all()


@pytest.mark.parametrize(
    ("group", "k"), [(32, 96), (32, 80), (32, 33), (64, 130), (16, 40), (24, 96), (48, 112), (256, 300)]
)
@pytest.mark.parametrize("config", [TINY, ENGINE], ids=["pointers", "engine"])
@pytest.mark.parametrize("zero", [None, -128.0])
def test_groups(group: int, k: int, config: Config, zero: float | None) -> None:
    """Last groups cut short, no multiples of BLOCK_K, and so large that sums pass 2^22."""
    case = Case(17, 40, k, group=group, zero=zero, seed=k)
    epilogue = Epilogue(dtype=torch.float32)
    check(linear_int8.reference(*case.operands(), epilogue), case.product(), epilogue)
    check(linear_int8.launch(*case.operands(), epilogue, config), case.product(), epilogue)


@pytest.mark.parametrize("group", [32, 128, 256, 512])
def test_group_sums_become_float_exactly(group: int) -> None:
    case = Case(16, 32, 2 * group, group=group, zero=None, ones=True)
    case.x[:], case.w[:] = -128, -128
    case.w[:, ::2] = 127
    case.weight = Weight.prepare(torch.from_numpy(case.w), torch.ones(2, 32), group, "int8", "cpu")
    y, _ = linear_int8.launch(*case.operands(), Epilogue(dtype=torch.float32), ENGINE)
    assert y is not None
    assert np.array_equal(y.double().numpy(), case.product())


MIXES = [*MIXED, *((ALL[-1], act, output, torch.float32) for act in ACTIVATIONS for output in OUTPUTS)]


@pytest.mark.parametrize("mix", MIXES)
def test_epilogue(mix: Mix) -> None:
    case = Case(18, 40, 33, seed=len(mix[0]))
    epilogue = epilogue_of(mix, 18, 40)
    check(linear_int8.reference(*case.operands(), epilogue), case.product(), epilogue)
    check(linear_int8.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


def test_low_rank_may_be_a_view_and_wider_factors() -> None:
    case = Case(18, 40, 32)
    for dtype in (torch.float32, torch.bfloat16):
        low = torch.randn(18, 48).to(dtype)[:, 7:27]
        epilogue = Epilogue(low=low, up=torch.randn(20, 40), dtype=torch.float32)
        check(linear_int8.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


@pytest.mark.parametrize("rank", [32, 33, 100])
def test_low_rank_in_pieces(rank: int) -> None:
    case = Case(18, 40, 32)
    epilogue = Epilogue(low=torch.randn(18, rank).half(), up=torch.randn(rank, 40).half(), dtype=torch.float32)
    check(linear_int8.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


def test_more_inputs_than_an_int32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_int8, "MOST_INPUTS", 63)
    monkeypatch.setattr(linear_int8, "_kernel", None)
    case = Case(16, 32, 64)
    epilogue = Epilogue(dtype=torch.float32)
    check(linear_int8.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


def test_gate_of_each_row() -> None:
    case = Case(17, 40, 32)
    epilogue = Epilogue(gate=torch.randn(17, 40), dtype=torch.float32)
    check(linear_int8.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


def test_scales_may_lie_anywhere() -> None:
    """Views into the numbers of a bin."""
    case = Case(16, 32, 32)
    x, weight, scale, zero = case.operands()
    assert zero is not None
    row = torch.tensor([9.0, float(scale), float(zero), 0.05, 3.0])
    quant = Quant(row[3:4], row[4:5])
    epilogue = Epilogue(quant=quant, dtype=torch.float32)
    check(linear_int8.launch(x, weight, row[1], row[2], epilogue, TINY), case.product(), epilogue)


@triton.jit
def _quantize_all(v, scale, zero, q, LOW: tl.constexpr, HIGH: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(q + at, quantize(tl.load(v + at), scale, zero, LOW, HIGH, 0))


@pytest.mark.parametrize("scale", [0.0371, 1 / 3, 1.0, 2.0**-7, 3.0e-5, 517.3])
@pytest.mark.parametrize(("zero", "low", "high"), [(None, -128, 127), (-128.0, -128, 127), (-121.0, -128, -113)])
def test_codes_are_those_of_the_quotient(scale: float, zero: float | None, low: int, high: int) -> None:
    """Bit for bit, ties and infinities too: a product with 1 / scale would round many ties the other way."""
    size = 4096
    ties = (torch.arange(size // 2) - size // 4 + 0.5) * np.float32(scale)
    v = torch.cat([ties, torch.randn(size // 2, generator=torch.manual_seed(1)) * 90 * scale]).float()
    v[:4] = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38])
    quant = Quant(torch.tensor(scale), None if zero is None else torch.tensor(zero), low, high)
    q = torch.empty(size, dtype=torch.int8)
    with np.errstate(over="ignore"):
        _quantize_all[(1,)](v, quant.scale, quant.zero, q, LOW=low, HIGH=high, SIZE=size)
    assert torch.equal(q, quant.codes(v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_chooses(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    case = Case(17, 40, 32)
    more = {"bias": torch.randn(40), "residual": torch.randn(17, 40)}
    epilogue = Epilogue(dtype=dtype, **more)
    seen: list[str] = []
    for name in ("launch", "reference"):
        real = getattr(linear_int8, name)
        monkeypatch.setattr(linear_int8, name, lambda *a, name=name, real=real: (seen.append(name), real(*a))[1])
    x, weight, scale, zero = case.operands()
    check(linear(x, weight, scale, zero, dtype=dtype, **more), case.product(), epilogue)
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    assert _backend.forced(), "tests run with TRITON_INTERPRET=1"
    check(linear(x, weight, scale, zero, dtype=dtype, **more), case.product(), epilogue)
    assert seen == ["reference", "launch"]


def test_linear_of_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    case = Case(0, 40, 32)
    y, q = linear(*case.operands(), quant=Quant(torch.ones(1)))
    assert y is not None and q is not None
    assert (y.shape, y.dtype, q.shape, q.dtype) == ((0, 40), torch.bfloat16, (0, 40), torch.int8)


def test_linear_refuses() -> None:
    case = Case(4, 40, 32)
    x, weight, scale, zero = case.operands()
    with pytest.raises(ValueError, match=r"\[4, 31\]"):
        linear(x[:, 1:], weight, scale, zero)
    with pytest.raises(ValueError, match="without a scale"):
        linear(x, weight)
    with pytest.raises(ValueError, match="float64"):
        linear(x.double(), weight)
    with pytest.raises(ValueError, match="relu"):
        linear(x, weight, scale, zero, act="relu")
    with pytest.raises(ValueError, match="together"):
        linear(x, weight, scale, zero, low=torch.ones(4, 3))
    with pytest.raises(ValueError, match="bias"):
        linear(x, weight, scale, zero, bias=torch.ones(39))
    with pytest.raises(ValueError, match="samples"):
        linear(x, weight, scale, zero, gate=torch.ones(3, 40))


def test_weights() -> None:
    case = Case(1, 40, 33, group=16)
    weight = case.weight
    assert weight.data.shape == (40, 48)
    assert torch.equal(weight.codes(), torch.from_numpy(case.w))
    values = case.w * np.repeat(case.scale, 16, 0)[:33]
    assert np.allclose(weight.values().numpy(), values, rtol=1e-6)
    assert weight.nbytes == 40 * 48 + 4 * 3 * 40 + 4 * 40
    assert Weight.prepare(torch.from_numpy(case.w), torch.ones(1), 0, "int8", "cpu").scale.shape == (40,)
    with pytest.raises(ValueError, match="groups of 16"):
        Weight.prepare(torch.from_numpy(case.w), torch.ones(2, 40), 16, "int8", "cpu")
