"""Normalization and rotary embedding as one kernel, in Triton's interpreter, against numpy in float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels import rope as kernel
from vdq_export.targets.cuda.kernels._quant import FLOAT8

Floats = npt.NDArray[np.float64]
EPSILON = 1e-5
CONFIG = {"BLOCK_M": 4, "num_warps": 4, "num_stages": 1}


def given(
    samples: int, length: int, heads: int, d: int, turned: int, *, norm: str = "none", weights: int = 0,
    bias: bool = False, interleaved: bool = False, codes: bool = False, seed: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of rope; weights: how many numbers the weight has, 0 none; turned: channels that rotate."""
    rng = torch.Generator().manual_seed(seed)
    angles = torch.rand(length, turned // 2, generator=rng) * 6.3
    return {
        "x": torch.randn(samples, length, heads * d, generator=rng) * 2 + 0.3,
        "heads": heads, "norm": norm, "epsilon": EPSILON, "interleaved": interleaved, "dtype": torch.float32,
        "weight": torch.rand(weights, generator=rng) + 0.5 if weights else None,
        "bias": torch.randn(weights, generator=rng) if bias else None,
        "cos": angles.cos() if turned else None, "sin": angles.sin() if turned else None,
        "scale": torch.rand(heads, generator=rng) * 0.03 + 0.01 if codes else None,
    }  # fmt: skip


def exact(arguments: dict[str, Any]) -> Floats:
    """r[B, S, H·D] by the definition, channel by channel; codes are round(r / scale) of it."""
    x = arguments["x"].numpy().astype(np.float64)
    samples, length, width = x.shape
    heads = arguments["heads"]
    v = x.reshape(samples, length, heads, -1)
    d = v.shape[3]
    if arguments["norm"] == "layer_head":
        v = (v - v.mean(3, keepdims=True)) / np.sqrt(v.var(3, keepdims=True) + EPSILON)
    elif arguments["norm"] != "none":
        axes = (2, 3) if arguments["norm"] == "rms" else 3
        v = v / np.sqrt((v**2).mean(axes, keepdims=True) + EPSILON)
    for name, combine in (("weight", np.multiply), ("bias", np.add)):
        if arguments[name] is not None:
            v = combine(v, arguments[name].numpy().astype(np.float64).reshape(-1, d))
    r = v.copy()
    half = 0 if arguments["cos"] is None else arguments["cos"].shape[1]
    for f in range(half):
        i, j = (2 * f, 2 * f + 1) if arguments["interleaved"] else (f, half + f)
        cos, sin = (arguments[name][:, f].numpy().astype(np.float64)[:, None] for name in ("cos", "sin"))
        r[..., i] = v[..., i] * cos - v[..., j] * sin
        r[..., j] = v[..., j] * cos + v[..., i] * sin
    if arguments["scale"] is not None:
        r = r / arguments["scale"].numpy().astype(np.float64)[:, None]
        if arguments.get("codes") == FLOAT8:
            r = np.clip(r, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        else:
            r = np.clip(np.rint(r), -128, 127)
    return r.reshape(samples, length, width)


CASES = {
    "wan": given(2, 5, 3, 32, 32, norm="rms", weights=96, interleaved=True),
    "wan codes": given(2, 5, 3, 32, 32, norm="rms", weights=96, interleaved=True, codes=True),
    "a head of 72, half-split": given(1, 7, 2, 72, 72, norm="rms_head", weights=72),
    "a layer norm a head": given(1, 4, 3, 16, 16, norm="layer_head", weights=16, bias=True, codes=True),
    "64 of 96 channels": given(1, 3, 2, 96, 64, norm="rms_head", weights=96, codes=True),
    "64 of 96 channels, interleaved": given(1, 3, 2, 96, 64, interleaved=True),
    "no angles": given(2, 3, 5, 8, 0, norm="rms", weights=40, codes=True),
    "one token": given(1, 1, 1, 8, 8, norm="rms", weights=8),
    "codes alone": given(2, 3, 2, 24, 0, codes=True),
    "float8 codes": {**given(2, 5, 3, 32, 32, norm="rms", weights=96, codes=True), "codes": FLOAT8},
    "float8 codes alone": {**given(2, 3, 2, 24, 0, codes=True), "codes": FLOAT8},
}


def wrong(got: torch.Tensor, arguments: dict[str, Any]) -> str | None:
    """Floats: float32 sums of up to 96 channels and two products, far below 2e-6 of values up to 10. Codes: a float32
    quotient may fall on the other side of a tie, one code beside; of continuous data one in thousands does."""
    want = exact(arguments)
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}"
    apart = np.abs(got.float().numpy().astype(np.float64) - want)
    if arguments["scale"] is None:
        return None if apart.max() < 2e-5 else f"{apart.max():.2g} off"
    step = 1.0 if got.dtype == torch.int8 else np.exp2(np.floor(np.log2(np.maximum(np.abs(want), 2**-6))) - 3)
    return None if (apart <= step).all() and (apart > 0).mean() < 0.01 else f"{(apart / step).max():.0f} codes off"


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_its_definition(name: str) -> None:
    got = kernel.launch(**CASES[name], config=CONFIG)
    assert wrong(got, CASES[name]) is None


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_is_the_definition(name: str) -> None:
    assert wrong(kernel.reference(**CASES[name]), CASES[name]) is None


@pytest.mark.parametrize(
    "fault",
    [
        {"interleaved": False}, {"norm": "rms_head"}, {"epsilon": 1.0}, {"weight": None}, {"cos": CASES["wan"]["sin"]},
        {"sin": -CASES["wan"]["sin"]}, {"heads": 1},
    ],
    ids=["half-split", "norm", "epsilon", "weight", "cosine", "sine", "heads"],
)  # fmt: skip
def test_a_fault_is_seen(fault: dict[str, Any]) -> None:
    got = kernel.launch(**{**CASES["wan"], **fault}, config=CONFIG)
    assert wrong(got, CASES["wan"]) is not None


def test_a_fault_in_the_codes_is_seen() -> None:
    scale = CASES["wan codes"]["scale"]
    got = kernel.launch(**{**CASES["wan codes"], "scale": scale.flip(0)}, config=CONFIG)
    assert wrong(got, CASES["wan codes"]) is not None


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    whole = CASES["wan"]
    wide = torch.cat((torch.full_like(whole["x"], 9.0), whole["x"]), 2)
    got = kernel.launch(**{**whole, "x": wide[..., whole["x"].shape[2] :]}, config=CONFIG)
    assert wrong(got, whole) is None


def test_bfloat16_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as plain torch: both round the same float32 numbers, up to their last bit."""
    arguments = {**CASES["wan"], "dtype": torch.bfloat16, "x": CASES["wan"]["x"].bfloat16()}
    got, want = kernel.launch(**arguments, config=CONFIG), kernel.reference(**arguments)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)
    assert (got != want).float().mean() < 0.01


def test_codes_saturate() -> None:
    arguments = {**CASES["codes alone"], "scale": torch.full((2,), 1e-4)}
    got = kernel.launch(**arguments, config=CONFIG)
    assert got.min() == -128
    assert got.max() == 127


@pytest.mark.parametrize(
    "wrong",
    [{"weight": torch.ones(31)}, {"bias": torch.ones(3)}, {"scale": torch.ones(1)}, {"sin": torch.ones(5, 15)},
     {"cos": torch.ones(4, 16), "sin": torch.ones(4, 16)}, {"cos": torch.ones(5, 17), "sin": torch.ones(5, 17)}],
    ids=["weight", "bias", "scale", "sine", "tokens", "width"],
)  # fmt: skip
def test_operands_of_another_size_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heads"):
        kernel.rope(**{**CASES["wan"], **wrong})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_float8_codes_saturate(arch: str) -> None:
    """sm_80 has no such type: the kernel stores its bits."""
    arguments = {**CASES["float8 codes alone"], "scale": torch.tensor([1e-4, 0.05])}
    with _config.assume(arch):
        got = kernel.launch(**arguments, config=CONFIG)
    assert got.dtype == FLOAT8
    assert (got.float().min(), got.float().max()) == (-448, 448)
    assert wrong(got, arguments) is None


def test_the_public_function_launches_where_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(kernel, "launch", lambda x, **_: seen.append("kernel") or x)
    monkeypatch.setattr(kernel, "runs_triton", lambda _: True)
    kernel.rope(**CASES["wan"])
    assert seen == ["kernel"]
    empty = kernel.rope(**{**CASES["wan"], "x": torch.empty(2, 0, 96), "cos": None, "sin": None})
    assert empty.shape == (2, 0, 96)
    assert seen == ["kernel"], "no tokens, no launch"
