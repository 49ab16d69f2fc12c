"""Attention on codes as one kernel, in Triton's interpreter, against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels import attention as public
from vdq_export.targets.cuda.kernels import attention_int8 as kernel
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels._tuning import Config

Floats = npt.NDArray[np.float64]
HALF_PRECISION = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, FLOAT8: 2.0**-4}


def config(block_m: int = 16, block_n: int = 32, parts: int = 1, tma: int = 0) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "PARTS": parts, "TMA": tma, "num_warps": 4, "num_stages": 2}


def given(
    samples: int, heads: int, d: int, sq: int, sk: int, v: torch.dtype = torch.float16,
    mask: torch.Tensor | None = None, seed: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of attention. Logits reach ±10 and more: some rows look at few keys, some at many."""
    rng = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randint(-128, 128, (samples, length, heads * d), generator=rng, dtype=torch.int8) for length in (sq, sk)
    )
    values = torch.randn(samples, sk, heads * d, generator=rng) + 0.5
    v_scale = torch.rand(heads, generator=rng) * 0.01 + 0.005 if v == FLOAT8 else None
    if v_scale is not None:
        values = (values.unflatten(2, (heads, -1)) / v_scale[:, None]).clamp(-448, 448).flatten(2)
    return {
        "q": q, "k": k, "v": values.to(v), "heads": heads, "scale": d**-0.5, "mask": mask, "dtype": torch.float32,
        "q_scale": torch.rand(heads, generator=rng) * 0.02 + 0.01,
        "k_scale": torch.rand(heads, generator=rng) * 0.02 + 0.01, "v_scale": v_scale,
    }  # fmt: skip


def heads_of(rows: torch.Tensor, heads: int, scale: torch.Tensor | None) -> Floats:
    values: Floats = rows.float().numpy().astype(np.float64)
    values = values.reshape(*values.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return values if scale is None else values * scale.numpy().astype(np.float64)[:, None, None]


def exact(arguments: dict[str, Any]) -> tuple[Floats, Floats]:
    """y[B, Sq, H·D] by the definition, and what it is made of: Σ p·|v|, by which errors are measured."""
    heads = arguments["heads"]
    q, k, v = (heads_of(arguments[name], heads, arguments[f"{name}_scale"]) for name in "qkv")
    logits = q @ k.swapaxes(2, 3) * arguments["scale"]
    if arguments["mask"] is not None:
        logits = logits + arguments["mask"].numpy().astype(np.float64)
    highest = logits.max(3, keepdims=True)
    p = np.exp(logits - np.where(np.isneginf(highest), 0.0, highest))
    total = p.sum(3, keepdims=True)
    p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
    return tuple(part.transpose(0, 2, 1, 3).reshape(arguments["q"].shape) for part in (p @ v, p @ np.abs(v)))  # type: ignore[return-value]


def wrong(got: torch.Tensor | None, arguments: dict[str, Any]) -> str | None:
    """Weights are rounded to v's format, half a step of which is their relative error at most (float32: 2^-20 for the
    statistics and 2^x instead): so y is off by no more than that part of Σ p·|v|, and a little float32 noise. E4M3 has
    weights below 2^-15 of the largest, which lose bits and then vanish: at most Sk·2^-19 of the largest in all."""
    want, made_of = exact(arguments)
    if got is None or got.shape != want.shape:
        return "no such result"
    part = HALF_PRECISION[arguments["v"].dtype]
    apart = np.abs(got.double().numpy() - want) / (part * 1.02 * made_of + 3e-6)
    return None if apart.max() <= 1 else f"{apart.max():.3g} times what it may be off"


def ran(arguments: dict[str, Any], **more: int) -> torch.Tensor | None:
    return kernel.launch(**arguments, config=config(**more))[0]


def infinite(shape: tuple[int, ...], lost: tuple[int, ...]) -> torch.Tensor:
    """A mask of zeros and −inf; rows in `lost` may see no key."""
    mask = torch.zeros(shape)
    mask[torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4] = -torch.inf
    mask[..., 0] = 0.0
    mask[..., list(lost), :] = -torch.inf
    return mask


SHAPES = {
    "whole blocks": (1, 2, 32, 32, 64), "queries and keys left over": (2, 3, 64, 21, 75), "one key": (2, 1, 32, 5, 1),
    "one query": (1, 2, 32, 1, 40), "a head of 72": (1, 2, 72, 18, 50), "a head of 96": (1, 2, 96, 16, 33),
    "a head of 128": (1, 1, 128, 17, 70),
}  # fmt: skip


@pytest.mark.parametrize("v", [torch.float16, torch.bfloat16, FLOAT8], ids=["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_its_definition(shape: str, v: torch.dtype) -> None:
    arguments = given(*SHAPES[shape], v=v)
    assert wrong(ran(arguments), arguments) is None


@pytest.mark.parametrize("v", [torch.float32, torch.bfloat16, FLOAT8], ids=["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tma", [0, 1])
def test_parts_and_the_copy_engine_change_nothing(v: torch.dtype, parts: int, tma: int) -> None:
    arguments = given(2, 2, 32, 37, 50, v=v)
    assert wrong(ran(arguments, parts=parts, tma=tma), arguments) is None


def test_plain_torch_is_the_definition() -> None:
    for arguments in (given(2, 3, 16, 21, 35), given(1, 2, 24, 4, 9, v=FLOAT8), given(1, 2, 8, 1, 1)):
        assert wrong(public.reference(**arguments)[0], {**arguments, "v": arguments["v"].float()}) is None


MASKS = {
    "keys of a sample": infinite((2, 1, 1, 70), ()), "every head its own": infinite((1, 3, 20, 70), (3, 17)),
    "everything": infinite((2, 3, 20, 70), (0, 19)), "no key at all": torch.full((1, 1, 20, 70), -torch.inf),
    "finite": torch.randn(1, 1, 20, 70, generator=torch.Generator().manual_seed(2)) * 4,
    "the first blocks lost": torch.cat((torch.full((64,), -torch.inf), torch.zeros(6))).reshape(1, 1, 1, 70),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("v", [torch.float16, FLOAT8], ids=["fp16", "fp8"])
def test_masks(mask: str, v: torch.dtype) -> None:
    """Rows without any key are zero; blocks without any key leave nothing behind."""
    arguments = given(2, 3, 32, 20, 70, v=v, mask=MASKS[mask])
    assert wrong(ran(arguments, parts=2), arguments) is None
    assert wrong(public.reference(**arguments)[0], arguments) is None


def test_the_least_float_is_no_infinity() -> None:
    """A mask of float32's least value everywhere: all keys count alike, as in every other runtime."""
    mask = torch.full((1, 1, 3, 40), torch.finfo(torch.float32).min)
    arguments = given(1, 1, 32, 3, 40, mask=mask)
    alike = {**arguments, "mask": None, "q": torch.zeros_like(arguments["q"])}
    assert wrong(ran(arguments), alike) is None


def test_the_least_float_is_none_in_sixteen_bits() -> None:
    """torch's attention of float16, with the same mask: not a row without keys, which would be zero, nor NaN."""
    arguments = given(1, 1, 32, 3, 40, mask=torch.full((1, 1, 3, 40), torch.finfo(torch.float32).min))
    for name in "qk":
        arguments |= {name: torch.zeros_like(arguments[name]).half(), f"{name}_scale": None}
    y, _ = public.attention(**arguments)
    assert y is not None
    torch.testing.assert_close(y, arguments["v"].float().mean(1, keepdim=True).expand_as(y), rtol=0, atol=2e-3)


def test_a_negative_scale_goes_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "runs_triton", lambda _: True)
    monkeypatch.setattr(kernel, "launch", None)
    arguments = {**given(1, 2, 32, 4, 5, v=torch.float32), "scale": -0.1}
    assert wrong(public.attention(**arguments)[0], arguments) is None


def test_without_float8_on_the_device() -> None:
    """sm_80: E4M3 values become float16, exactly; codes leave as bytes."""
    arguments = given(2, 2, 32, 20, 37, v=FLOAT8)
    quant = Quant(torch.tensor(0.004), None, dtype=FLOAT8)
    with _config.assume("sm_80"):
        y, codes = kernel.launch(**arguments, quant=quant, config=config())
    assert wrong(y, {**arguments, "v": arguments["v"].half()}) is None
    assert y is not None and codes is not None and torch.equal(codes.float(), quant.codes(y).float())


@pytest.mark.parametrize("v", [torch.float16, FLOAT8], ids=["fp16", "fp8"])
@pytest.mark.parametrize("fault", ["a key", "a score", "a scale", "a value", "the order of keys", "a head", "a block"])
def test_a_fault_is_seen(fault: str, v: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = given(1, 2, 32, 20, 70, v=v)
    planted = dict(right)
    if fault == "a key":  # the last one is left out
        planted |= {"k": right["k"][:, :-1], "v": right["v"][:, :-1]}
    elif fault == "a score":
        planted["scale"] = right["scale"] * 1.3
    elif fault == "a scale":
        planted["k_scale"] = right["k_scale"].flip(0)
    elif fault == "a value":
        planted["v"] = (right["v"].float() * 1.2).to(v)
    elif fault == "the order of keys":
        planted["v"] = right["v"].flip(1)
    elif fault == "a head":
        planted["v"] = right["v"].roll(32, 2)
    else:
        planted |= {name: right[name][:, 32:] for name in "kv"}
    assert wrong(ran(planted), right) is not None


def test_weights_far_below_the_largest_still_count_in_e4m3() -> None:
    """One key with weight 1 and 255 with weight 2^-12 each, value 0 against value 1: y is 6 %, all from the small
    ones, which E4M3 without the shift would round to zero."""
    arguments = given(1, 1, 32, 1, 256, v=FLOAT8)
    q, k, v = torch.zeros(1, 1, 32), torch.zeros(1, 256, 32), torch.ones(1, 256, 32)
    q[..., 0], k[:, 0, 0], v[:, 0] = 1.0, 12.0, 0.0
    unit = torch.ones(1)
    arguments |= {"q": q.to(torch.int8), "k": k.to(torch.int8), "v": v.to(FLOAT8), "scale": float(np.log(2.0))}
    arguments |= {"q_scale": unit, "k_scale": unit, "v_scale": unit}
    y = ran(arguments)
    assert y is not None
    expected = 255 * 2.0**-12 / (1 + 255 * 2.0**-12)
    assert torch.allclose(y, torch.full_like(y, expected), rtol=2.0**-4)


def test_the_greatest_scores_are_exact() -> None:
    """Codes at the ends of their range, a head of 256: |s| reaches 2^22, the most that starts at 1.5·2^23 can hold."""
    arguments = given(1, 1, 256, 4, 40, v=torch.float32)
    arguments["q"][:, :2], arguments["k"][:, ::2], arguments["k"][:, 1::2] = -128, -128, 127
    arguments["k"][:, 2:] = torch.randint(-128, -100, (1, 38, 256), generator=torch.Generator().manual_seed(0))
    arguments["scale"] = 1e-3
    assert wrong(ran(arguments, block_m=16, block_n=16), arguments) is None


def test_codes_and_floats_come_out_together() -> None:
    arguments = given(2, 2, 32, 20, 37, v=torch.float32)
    for quant in (
        Quant(torch.tensor(0.011), torch.tensor(5.0)), Quant(torch.tensor([0.02]), None, -128, -113),
        Quant(torch.tensor(0.004), None, dtype=FLOAT8),
    ):  # fmt: skip
        y, codes = kernel.launch(**arguments, quant=quant, config=config(parts=2))
        assert y is not None and codes is not None
        assert codes.dtype == quant.dtype
        assert torch.equal(codes.float(), quant.codes(y).float())
        alone = kernel.launch(**arguments, quant=quant, keep=False, config=config(parts=2))
        assert alone[0] is None
        assert alone[1] is not None and torch.equal(alone[1].float(), codes.float())


def test_slices_of_one_tensor_are_read_in_place() -> None:
    arguments = given(2, 2, 32, 20, 20)
    joined = torch.cat((arguments["q"], arguments["k"]), 2)
    arguments |= dict(zip("qk", joined.chunk(2, 2), strict=True))
    assert not arguments["k"].is_contiguous()
    for tma in (0, 1):
        assert wrong(ran(arguments, tma=tma), arguments) is None


def test_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes go to the kernel, floats to torch, and nothing is launched without queries or keys."""
    seen: list[int] = []
    monkeypatch.setattr(public, "runs_triton", lambda _: True)
    monkeypatch.setattr(kernel, "launch", lambda *_, **__: seen.append(1) or (None, None))
    public.attention(**given(1, 2, 32, 4, 5))
    assert seen == [1]
    y, _ = public.attention(**given(1, 2, 32, 4, 0))
    assert y is not None and y.shape == (1, 4, 64) and not y.any()
    y, _ = public.attention(**given(1, 2, 32, 0, 4))
    assert y is not None and y.shape == (1, 0, 64)
    assert seen == [1]


def test_floats_go_to_torch_and_come_out_as_codes() -> None:
    arguments = given(2, 2, 16, 9, 11, v=torch.float32, mask=infinite((1, 1, 9, 11), (4,)))
    for name in "qk":
        values = arguments[name].float().unflatten(2, (2, -1)) * arguments[f"{name}_scale"][:, None]
        arguments |= {name: values.flatten(2), f"{name}_scale": None}
    quant = Quant(torch.tensor(0.01), torch.tensor(-3.0))
    y, codes = public.attention(**arguments, quant=quant)
    assert wrong(y, arguments) is None
    assert y is not None and codes is not None and torch.equal(codes, quant.codes(y))
