"""Float activations over 8- and 4-bit weights on the CUDA target, in plain torch and in Triton's interpreter.

Both are held to float64 (tests/cuda_epilogue.py): x is what it is in its own type, levels are exact in it, and scales
stay float32, so no tolerance here is one of 16-bit floats.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.cuda_epilogue import MIXED, Mix, check, epilogue_of
from vdq_export.graph import Array
from vdq_export.targets.cuda.kernels import _backend, linear_weight_only
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import Epilogue
from vdq_export.targets.cuda.kernels._quant import Quant
from vdq_export.targets.cuda.kernels._weight import Kind, Weight
from vdq_export.targets.cuda.kernels.linear import linear

TINY: Config = {
    "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2, "TMA": 0,
    "PERSISTENT": 0,
}  # fmt: skip
ENGINE: Config = {**TINY, "TMA": 1}
PERSISTENT: Config = {**ENGINE, "PERSISTENT": 1}
CONFIGS = pytest.mark.parametrize("config", [TINY, ENGINE, PERSISTENT], ids=["pointers", "engine", "persistent"])
KINDS = pytest.mark.parametrize("kind", ["int4", "int8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
LIMITS: dict[Kind, int] = {"int4": 8, "int8": 128}
FLOAT = Epilogue(dtype=torch.float32)


class Case:
    """Operands of one linear, of levels of the full range."""

    def __init__(self, kind: Kind, m: int, n: int, k: int, group: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        made = np.random.default_rng(m + n + k)
        limit = LIMITS[kind]
        self.x = torch.from_numpy(made.normal(size=(m, k))).to(dtype)
        self.w = made.integers(-limit, limit, (k, n)).astype(np.int8)
        rows = -(-k // group) if group else 1
        self.scale = (made.uniform(0.5, 1.5, (rows, n)) / limit).astype(np.float32)
        self.kind, self.group = kind, group

    def operands(self) -> tuple[torch.Tensor, Weight]:
        w, scale = torch.from_numpy(self.w), torch.from_numpy(self.scale)
        return self.x, Weight.prepare(w, scale, self.group, self.kind, "cpu")

    def product(self) -> Array:
        """y before the epilogue, float64."""
        values = self.w * np.repeat(self.scale.astype(np.float64), self.group or len(self.w), 0)[: len(self.w)]
        return np.asarray(self.x.double().numpy() @ values)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 64), (17, 33, 31), (16, 32, 256), (40, 24, 300)])
@CONFIGS
@KINDS
@DTYPES
def test_sums(shape: tuple[int, int, int], config: Config, kind: Kind, dtype: torch.dtype) -> None:
    case = Case(kind, *shape, dtype=dtype)
    check(linear_weight_only.launch(*case.operands(), FLOAT, config), case.product(), FLOAT)
    check(linear_weight_only.reference(*case.operands(), FLOAT), case.product(), FLOAT)


@pytest.mark.parametrize(
    ("group", "k"), [(32, 96), (32, 80), (64, 130), (128, 513), (256, 600), (48, 100), (24, 72), (300, 300)]
)
@CONFIGS
@KINDS
def test_groups(group: int, k: int, config: Config, kind: Kind) -> None:
    """Last groups cut short; groups that hold no tile (24), more than one, more than a half of the inputs."""
    case = Case(kind, 17, 40, k, group)
    check(linear_weight_only.launch(*case.operands(), FLOAT, config), case.product(), FLOAT)
    check(linear_weight_only.reference(*case.operands(), FLOAT), case.product(), FLOAT)


@KINDS
@DTYPES
@pytest.mark.parametrize("group", [0, 32])
def test_weights_are_not_rounded(kind: Kind, dtype: torch.dtype, group: int) -> None:
    """x of one input each: y is level times float32 scale, to its last bit."""
    case = Case(kind, 64, 40, 64, group, dtype)
    case.x = torch.eye(64).to(dtype)
    y, _ = linear_weight_only.launch(*case.operands(), FLOAT, TINY)
    assert y is not None
    values = case.w * np.repeat(case.scale, group or 64, 0)[:64]
    assert np.array_equal(y.numpy(), values)


@pytest.mark.parametrize("mix", MIXED, ids=str)
def test_epilogue(mix: Mix) -> None:
    odd = len(mix[0]) % 2
    case = Case("int4" if odd else "int8", 18, 40, 33, group=32 * odd, dtype=mix[3])
    epilogue = epilogue_of(mix, 18, 40)
    check(linear_weight_only.reference(*case.operands(), epilogue), case.product(), epilogue)
    check(linear_weight_only.launch(*case.operands(), epilogue, TINY), case.product(), epilogue)


@KINDS
@DTYPES
@pytest.mark.parametrize("m", [1, 70])
def test_configurations_of_the_tables(kind: Kind, dtype: torch.dtype, m: int) -> None:
    case = Case(kind, m, 72, 80, dtype=dtype)
    check(linear_weight_only.launch(*case.operands(), FLOAT), case.product(), FLOAT)


@KINDS
def test_linear_chooses(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    case = Case(kind, 17, 40, 32)
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    assert _backend.forced(), "tests run with TRITON_INTERPRET=1"
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)
    monkeypatch.setattr(linear_weight_only, "_kernel", None)
    monkeypatch.delenv("VDQ_KERNELS")
    check(linear(*case.operands(), dtype=torch.float32), case.product(), FLOAT)


@KINDS
@pytest.mark.parametrize(("m", "n"), [(0, 40), (3, 0)])
def test_nothing(monkeypatch: pytest.MonkeyPatch, kind: Kind, m: int, n: int) -> None:
    monkeypatch.setattr(linear_weight_only, "_kernel", None)  # a device takes no grid of nothing
    y, q = linear_weight_only.launch(*Case(kind, m, n, 32).operands(), Epilogue(quant=Quant(torch.ones(1))), TINY)
    assert y is not None and q is not None
    assert (y.shape, y.dtype, q.shape, q.dtype) == ((m, n), torch.bfloat16, (m, n), torch.int8)
