"""Planted faults: kernels that compile, but not to what they should. Imported only where Triton does not interpret."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from tests.cuda_kernel_cases import WGMMA_INT8, Case, meta

PACKAGE = "tests.cuda_faults"


@triton.jit
def _matmul(x, w, y, m, n, k, along_n, along_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """y[m, n] = Σ_k x[m, k] · w, int8; w lies as its strides say."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for at in range(0, k, BLOCK_K):
        depth = at + tl.arange(0, BLOCK_K)
        a = tl.load(x + rows[:, None] * k + depth[None, :])
        b = tl.load(w + depth[:, None] * along_k + cols[None, :] * along_n)
        total = tl.dot(a, b, total)
    tl.store(y + rows[:, None] * n + cols[None, :], total)


def _launch(k_major: bool = True, rows: int = 128, columns: int = 128) -> None:
    m = n = k = 4096
    x, w, y = meta(m, k, dtype=torch.int8), meta(n, k, dtype=torch.int8), meta(m, n, dtype=torch.int32)
    strides = (k, 1) if k_major else (1, n)
    _matmul[m // rows, n // columns](
        x, w, y, m, n, k, *strides, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=64, num_warps=4, enable_fp_fusion=True
    )


FAULTS: dict[str, Case] = {
    "none": Case(_launch, (WGMMA_INT8,)),
    "not K-major": Case(partial(_launch, k_major=False), (WGMMA_INT8,)),
    "too few rows for wgmma": Case(partial(_launch, rows=32), (WGMMA_INT8,)),
    "too many accumulators": Case(partial(_launch, columns=256), (WGMMA_INT8,)),
}
