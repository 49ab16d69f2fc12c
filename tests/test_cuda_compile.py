"""Every kernel, as it is configured, compiles for sm_90 to the instructions it was written for, without spills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from tests.cuda_compile import Compiler, wrong
from tests.cuda_kernel_cases import BYTE_BY_BYTE, CASES, WGMMA_INT8, Case


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as one:
        yield one


@pytest.mark.parametrize("name", CASES)
def test_compiled_as_written(compiler: Compiler, name: str) -> None:
    assert wrong(CASES[name], compiler.compiled(name)) == []


# One of each kernel. sm_89 multiplies as sm_120 does, with the same shared memory.
ELSEWHERE = {"sm_80": r"mma\.sync", "sm_100": r"tcgen05\.mma", "sm_120": r"mma\.sync"}
KINDS = ("int8 gate residual", "int4", "fp8", "weight-only int4 groups", "attention")


@pytest.mark.parametrize("arch", ELSEWHERE)
@pytest.mark.parametrize("name", [*KINDS, "normalize fp8", "rope codes"])
def test_compiled_for_other_architectures(compiler: Compiler, name: str, arch: str) -> None:
    forms = (ELSEWHERE[arch],) if name in KINDS else ()
    assert wrong(Case(CASES[name].program, forms), compiler.compiled(name, arch), arch) == []


FAULTS = {
    "not K-major": (BYTE_BY_BYTE,),
    "too few rows for wgmma": ("no wgmma",),
    "too many accumulators": ("spills", "waits after each product: wgmma.mma_async instructions are serialized"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(compiler: Compiler, fault: str) -> None:
    found = wrong(Case(print, (WGMMA_INT8,)), compiler.compiled(fault))
    assert all(any(text in one for one in found) for text in FAULTS[fault]), found


def test_a_plain_product_has_no_fault(compiler: Compiler) -> None:
    assert wrong(Case(print, (WGMMA_INT8,)), compiler.compiled("none")) == []


def test_a_case_that_launches_nothing_is_seen() -> None:
    assert wrong(Case(print), []) == ["nothing was launched"]
