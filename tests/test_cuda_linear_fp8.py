"""FP8 linears of the CUDA target, in both forms: multiplied as float8, and as float16 where a device has no float8.

Plain torch and Triton's interpreter are held to float64 (tests/cuda_epilogue.py); products of small integers, whose
float32 sums are exact, to the integers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.cuda_epilogue import MIXED, Mix, check, epilogue_of
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import _backend, _config, linear_fp8
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels._weight import Weight
from vdq_export.targets.cuda.kernels.linear import linear

TINY: Config = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2, "TMA": 0,
    "PERSISTENT": 0,
}  # fmt: skip
ENGINE: Config = {**TINY, "TMA": 1}
PERSISTENT: Config = {**ENGINE, "PERSISTENT": 1}
CONFIGS = pytest.mark.parametrize("config", [TINY, ENGINE, PERSISTENT], ids=["pointers", "engine", "persistent"])
BITS = pytest.mark.parametrize("bits", [False, True], ids=["float8", "float16"])
FLOAT = Epilogue(dtype=torch.float32)


class Case:
    """Operands of one linear: numbers of every size that float8 has, or (ones) small integers with scales of one."""

    def __init__(self, m: int, n: int, k: int, ones: bool = False, group: int = 0) -> None:
        made = torch.Generator().manual_seed(m + n + k)

        def numbers(*shape: int) -> torch.Tensor:
            if ones:
                return torch.randint(-16, 17, shape, generator=made).to(FLOAT8)
            spread = torch.exp2(torch.randint(-9, 8, shape, generator=made))
            return (torch.randn(shape, generator=made) * spread).clamp(-448, 448).to(FLOAT8)

        self.x, self.w, self.group = numbers(m, k), numbers(k, n), group
        rows = -(-k // group) if group else 1
        self.scale = torch.ones(rows, n) if ones else torch.rand(rows, n, generator=made) + 0.1
        self.x_scale = torch.tensor(1.0 if ones else 0.013)

    def operands(self) -> tuple[torch.Tensor, Weight, torch.Tensor, None]:
        return self.x, Weight.prepare(self.w, self.scale, self.group, "fp8", "cpu"), self.x_scale, None

    def product(self) -> Array:
        """y before the epilogue, float64."""
        scale = self.scale.double().repeat_interleave(self.group or len(self.w), 0)[: len(self.w)]
        return np.asarray((self.x.double() @ (self.w.double() * scale) * self.x_scale.double()).numpy())


SHAPES = [(1, 1, 1), (3, 1, 64), (17, 33, 31), (16, 32, 64), (40, 24, 300), (5, 70, 272)]


@pytest.mark.parametrize("shape", SHAPES)
@CONFIGS
@BITS
def test_sums_of_integers_are_exact(shape: tuple[int, int, int], config: Config, bits: bool) -> None:
    case = Case(*shape, ones=True)
    y, _ = linear_fp8.launch(*case.operands(), FLOAT, config, bits)
    assert y is not None
    assert np.array_equal(y.double().numpy(), case.product())


@pytest.mark.parametrize("shape", SHAPES)
@CONFIGS
@BITS
def test_sums(shape: tuple[int, int, int], config: Config, bits: bool) -> None:
    case = Case(*shape)
    check(linear_fp8.launch(*case.operands(), FLOAT, config, bits), case.product(), FLOAT)
    check(linear_fp8.reference(*case.operands(), FLOAT), case.product(), FLOAT)


@BITS
def test_every_number(bits: bool) -> None:
    """All 254 that are no NaN, subnormal ones too, times one: themselves."""
    every = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127].view(FLOAT8)
    one = torch.eye(16, 32).to(FLOAT8)
    for x, w in ((torch.nn.functional.pad(every.float()[:, None], (0, 15)).to(FLOAT8), one), (one[:, :16], None)):
        w = torch.nn.functional.pad(every.float()[None], (0, 0, 0, 15)).to(FLOAT8) if w is None else w
        weight = Weight.prepare(w, torch.ones(w.shape[1]), 0, "fp8", "cpu")
        y, _ = linear_fp8.launch(x, weight, torch.ones(1), None, FLOAT, TINY, bits)
        assert y is not None
        assert torch.equal(y[:, 0] if len(y) > 16 else y[0], every.float())


@pytest.mark.parametrize("mix", MIXED, ids=str)
def test_epilogue(mix: Mix) -> None:
    case = Case(18, 40, 33)
    epilogue = epilogue_of(mix, 18, 40)
    check(linear_fp8.reference(*case.operands(), epilogue), case.product(), epilogue)
    check(linear_fp8.launch(*case.operands(), epilogue, TINY, bits=len(mix[0]) % 2 == 0), case.product(), epilogue)


@pytest.mark.parametrize(("arch", "float8"), [("sm_80", False), ("sm_89", True), ("sm_90", True)])
@pytest.mark.parametrize("m", [1, 70])
def test_architectures(monkeypatch: pytest.MonkeyPatch, arch: str, float8: bool, m: int) -> None:
    """What sm_80 lacks as a type reaches no kernel, neither in nor out."""
    case = Case(m, 72, 80)
    quant = Quant(torch.tensor(0.7), None, 0, 0, FLOAT8)
    epilogue = Epilogue(dtype=torch.float32, quant=quant)
    seen: list[torch.dtype] = []
    real = linear_fp8.operand

    def operand(tensor: torch.Tensor, rows: int, depth: int, config: Config) -> object:
        seen.append(tensor.dtype)
        return real(tensor, rows, depth, config)

    monkeypatch.setattr(linear_fp8, "operand", operand)
    with _config.assume(arch):
        assert linear_fp8.has_float8() is float8
        q = epilogue.arguments(*epilogue.outputs(m, 72, case.x.device), m)["q"]
        assert isinstance(q, torch.Tensor) and (q.dtype == FLOAT8) is float8
        check(linear_fp8.launch(*case.operands(), epilogue), case.product(), epilogue)
    assert seen == [FLOAT8 if float8 else torch.uint8] * 2


def test_groups_go_to_plain_torch() -> None:
    case = Case(5, 40, 70, group=32)
    check(linear_fp8.launch(*case.operands(), FLOAT, TINY), case.product(), FLOAT)


def test_linear_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(17, 40, 32)
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    assert _backend.forced(), "tests run with TRITON_INTERPRET=1"
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)
    monkeypatch.setattr(linear_fp8, "_kernel", None)
    monkeypatch.delenv("VDQ_KERNELS")
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)


@pytest.mark.parametrize(("m", "n"), [(0, 40), (3, 0)])
def test_nothing(monkeypatch: pytest.MonkeyPatch, m: int, n: int) -> None:
    monkeypatch.setattr(linear_fp8, "_kernel", None)  # a device takes no grid of nothing
    y, q = linear_fp8.launch(*Case(m, n, 32).operands(), Epilogue(quant=Quant(torch.ones(1))), TINY)
    assert y is not None and q is not None
    assert (y.shape, y.dtype, q.shape, q.dtype) == ((m, n), torch.bfloat16, (m, n), torch.int8)
