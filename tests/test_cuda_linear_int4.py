"""4-bit weights of the CUDA target: their packing, and the linear in plain torch and in Triton's interpreter.

Integer sums are held to be exact: with scales of one, float32 results below 2^24 are the integers themselves. The rest:
tests/cuda_epilogue.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.cuda_epilogue import MIXED, Mix, check, epilogue_of
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import _backend, _pack4, linear_int4
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue
from vdq_export.targets.cuda.kernels._quant import Quant
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.linear import linear

TINY: Config = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2, "num_warps": 4, "num_stages": 2, "TMA": 0,
    "PERSISTENT": 0,
}  # fmt: skip
ENGINE: Config = {**TINY, "TMA": 1}
PERSISTENT: Config = {**ENGINE, "PERSISTENT": 1}
CONFIGS = pytest.mark.parametrize("config", [TINY, ENGINE, PERSISTENT], ids=["pointers", "engine", "persistent"])
FLOAT = Epilogue(dtype=torch.float32)


class Case:
    """Operands of one linear. levels: of the activations, 16 for 4 bits, which start at −128 too."""

    def __init__(
        self, m: int, n: int, k: int, group: int = 0, zero: float | None = -57.0, levels: int = 256, ones: bool = False
    ) -> None:
        made = np.random.default_rng(m + n + k)
        self.x = made.integers(-128, levels - 128, (m, k)).astype(np.int8)
        self.w = made.integers(-8, 8, (k, n)).astype(np.int8)
        rows = -(-k // group) if group else 1
        self.scale = np.float32(1 if ones else made.uniform(0.5, 1.5, (rows, n)) / 7) * np.ones((rows, n), np.float32)
        self.x_scale = np.float32(1 if ones else 0.02)
        self.group, self.zero = group, zero

    def operands(self) -> tuple[torch.Tensor, Weight, torch.Tensor, torch.Tensor | None]:
        w, scale = torch.from_numpy(self.w), torch.from_numpy(self.scale)
        weight = Weight.prepare(w, scale, self.group, "int4", "cpu")
        zero = None if self.zero is None else torch.tensor([self.zero])
        return torch.from_numpy(self.x), weight, torch.tensor(self.x_scale), zero

    def product(self) -> Array:
        """y before the epilogue, float64."""
        shifted = self.x.astype(np.int64) - int(self.zero or 0)
        values = self.w * np.repeat(self.scale.astype(np.float64), self.group or len(self.w), 0)[: len(self.w)]
        return np.asarray((shifted @ values) * np.float64(self.x_scale))


@pytest.mark.parametrize("k", [1, 61, 256, 300])
def test_packing(k: int) -> None:
    levels = torch.randint(-8, 8, (5, k), dtype=torch.int8, generator=torch.manual_seed(k))
    packed = _pack4.pack(levels)
    half = _pack4.half(k)
    assert (packed.shape, packed.dtype) == ((5, half), torch.uint8)
    assert half % _pack4.ALIGNMENT == 0 and 2 * half < k + 2 * _pack4.ALIGNMENT
    assert torch.equal(_pack4.unpack(packed, k), levels)
    assert not _pack4.unpack(packed, 2 * half)[:, k:].any()
    assert int(packed[3, 0]) & 15 == int(levels[3, 0]) & 15
    if k > half + 7:
        assert int(packed[3, 7]) >> 4 == int(levels[3, half + 7]) & 15


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="from -3 to 8"):
        _pack4.pack(torch.tensor([[-3, 8]], dtype=torch.int8))


def test_weights_take_half_a_byte() -> None:
    k, n = 1536, 96
    codes = torch.zeros(k, n, dtype=torch.int8)
    bfloat16 = 2 * k * n
    assert Weight.prepare(codes, torch.ones(n), 0, "int4", "cpu").nbytes == k * n // 2 + 8 * n
    assert bfloat16 / Weight.prepare(codes, torch.ones(k // 128, n), 128, "int4", "cpu").nbytes > 3.6


def test_bytes_are_unpacked_by_words() -> None:
    """The instructions in `halves`, which the interpreter does not run, on every byte."""
    words = np.random.default_rng(0).permutation(np.arange(256, dtype=np.uint8)).view(np.uint32)
    first, second = (words << np.uint32(4)) & np.uint32(0xF0F0F0F0), words & np.uint32(0xF0F0F0F0)
    levels = _pack4.unpack(torch.from_numpy(words.view(np.uint8).copy())[:, None], 2).numpy()
    assert np.array_equal(np.stack([first.view(np.int8), second.view(np.int8)], 1), 16 * levels)


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 31), (16, 32, 256), (40, 24, 300), (5, 70, 272), (33, 41, 513)])
@CONFIGS
@pytest.mark.parametrize("zero", [None, -128.0, 127.0])
def test_sums_are_exact(shape: tuple[int, int, int], config: Config, zero: float | None) -> None:
    case = Case(*shape, zero=zero, ones=True)
    expected = case.product()
    assert np.abs(expected).max() < 2**24
    for y, _ in (linear_int4.launch(*case.operands(), FLOAT, config), linear_int4.reference(*case.operands(), FLOAT)):
        assert y is not None
        assert np.array_equal(y.double().numpy(), expected)


@pytest.mark.parametrize(("x", "w", "zero"), [(-128, -8, 127.0), (127, -8, -128.0), (127, 7, -128.0)])
def test_sums_of_extreme_codes_are_exact(x: int, w: int, zero: float) -> None:
    case = Case(16, 32, 512, zero=zero, ones=True)
    case.x[:], case.w[:] = x, w
    y, _ = linear_int4.launch(*case.operands(), FLOAT, TINY)
    assert y is not None
    assert (y == 512 * (x - zero) * w).all()


@pytest.mark.parametrize(
    ("group", "k"), [(32, 96), (32, 80), (64, 130), (64, 320), (128, 513), (256, 600), (96, 200), (48, 100), (300, 300)]
)
@CONFIGS
@pytest.mark.parametrize("zero", [None, -128.0])
def test_groups(group: int, k: int, config: Config, zero: float | None) -> None:
    """Last groups cut short; groups that hold no tile (48), more than one, more than a half of the inputs."""
    case = Case(17, 40, k, group=group, zero=zero)
    check(linear_int4.launch(*case.operands(), FLOAT, config), case.product(), FLOAT)
    check(linear_int4.reference(*case.operands(), FLOAT), case.product(), FLOAT)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("zero", [None, -128.0, -120.0])
def test_activations_of_four_bits(group: int, zero: float | None) -> None:
    case = Case(18, 40, 288, group=group, zero=zero, levels=16)
    check(linear_int4.launch(*case.operands(), FLOAT, TINY), case.product(), FLOAT)


@pytest.mark.parametrize("mix", MIXED, ids=str)
def test_epilogue(mix: Mix) -> None:
    case = Case(18, 40, 33, group=32 if len(mix[0]) % 2 else 0)
    epilogue = epilogue_of(mix, 18, 40)
    check(linear_int4.reference(*case.operands(), epilogue), case.product(), epilogue)
    check(linear_int4.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


@pytest.mark.parametrize("rank", [33, 100])
def test_low_rank_in_pieces(rank: int) -> None:
    case = Case(18, 40, 32)
    epilogue = Epilogue(low=torch.randn(18, rank).half(), up=torch.randn(rank, 40).half(), dtype=torch.float32)
    check(linear_int4.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


def test_low_rank_may_be_a_view_and_wider_factors() -> None:
    case = Case(18, 40, 32)
    for dtype in (torch.float32, torch.bfloat16):
        low = torch.randn(18, 48).to(dtype)[:, 7:27]
        epilogue = Epilogue(low=low, up=torch.randn(20, 40), dtype=torch.float32)
        check(linear_int4.launch(*case.operands(), epilogue, PERSISTENT), case.product(), epilogue)


@pytest.mark.parametrize("m", [1, 70])
@pytest.mark.parametrize("group", [0, 64])
def test_configurations_of_the_tables(m: int, group: int) -> None:
    case = Case(m, 72, 272, group=group)
    check(linear_int4.launch(*case.operands(), FLOAT), case.product(), FLOAT)


def test_more_inputs_than_an_int32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(3, 5, 40)
    monkeypatch.setattr(linear_int4, "MOST_INPUTS", 39)
    monkeypatch.setattr(linear_int4, "_kernel", None)
    check(linear_int4.launch(*case.operands(), FLOAT, TINY), case.product(), FLOAT)


def test_linear_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(17, 40, 32)
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    assert _backend.forced(), "tests run with TRITON_INTERPRET=1"
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)
    monkeypatch.setattr(linear_int4, "_kernel", None)
    monkeypatch.delenv("VDQ_KERNELS")
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)


@pytest.mark.parametrize(("m", "n"), [(0, 40), (3, 0)])
def test_nothing(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    monkeypatch.setattr(linear_int4, "_kernel", None)  # a device takes no grid of nothing
    y, q = linear_int4.launch(*Case(m, n, 32).operands(), Epilogue(quant=Quant(torch.ones(1))), TINY)
    assert y is not None and q is not None
    assert (y.shape, y.dtype, q.shape, q.dtype) == ((m, n), torch.bfloat16, (m, n), torch.int8)
