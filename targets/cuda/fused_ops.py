"""The operators of vdq.cuda (ops.py) as calls of the kernels, whose files are imported when one of theirs is called.

Kernels see rows: [M, K], M the product of the leading axes; gates, scales and shifts [B, N], of which a row of sample
m // (M // B) is taken. Views of the graph's shapes give both. Numbers of quantizers are float32, of one element or one
a head, and stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vdq_export.errors import MissingToolError
from vdq_export.targets.cuda.onnx_parts import Op
from vdq_export.targets.cuda.ops import INPUTS, OUTPUTS

PREFIX = "vdq.cuda."
KINDS = {"int8": "int8", "int4": "int4", "float8e4m3fn": "fp8"}  # weight_type -> kernels' name of it
CODES = {"int8": torch.int8, "float8e4m3fn": torch.float8_e4m3fn}  # out_type -> how codes lie in memory
COMPUTE = {  # operands that have the compute type when they are floats; others stay as they come, constants float32
    "Linear": ("x", "low", "up"), "Normalize": ("down",), "Attention": ("q", "k", "v"),
}  # fmt: skip
VECTORS = {  # operands of one axis, whatever axes of one element the graph gives them
    "Linear": ("bias", "post"), "Normalize": ("weight", "bias", "smooth", "post"),
    "Rope": ("weight", "bias", "out_scale"), "Attention": ("q_scale", "k_scale", "v_scale"),
}  # fmt: skip
TABLES = {"Rope": ("cos", "sin")}  # [tokens, channels]
HINT = "pip install 'vdq-export[cuda]'"
Result = Tensor | None


def named(op: Op) -> dict[str, str]:
    """Operand -> value, of those that the node has."""
    return {one: value for one, value in zip(INPUTS[op.type[len(PREFIX) :]], op.inputs, strict=False) if value}


def operands(op: Op, *names: str) -> list[str]:
    """The values of these operands."""
    return [value for one, value in named(op).items() if one in names]


def is_float(op: Op, index: int) -> bool:
    """Whether an output holds floats, not codes."""
    short = op.type[len(PREFIX) :]
    if short == "Rope":
        return "out_scale" not in named(op)
    return OUTPUTS[short][index] != "q"


def kernel(file: str, name: str) -> Any:
    """A function of kernels/<file>.py. Raises MissingToolError without Triton."""
    try:
        return getattr(import_module(f"vdq_export.targets.cuda.kernels.{file}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise MissingToolError("the kernels of the cuda target need triton", hint=HINT) from error


# -- what the programs call ------------------------------------------------------------------------------------------


def vector(x: Tensor) -> Tensor:
    return x.reshape(-1)


def table(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def row(bins: Tensor, index: Tensor) -> Tensor:
    """bins[B, P], bin int64[1] -> the numbers of one bin, [P]."""
    return bins.index_select(0, index).view(-1)


def pick(row: Tensor, *, offset: int, shape: tuple[int, ...] = ()) -> Tensor:
    """A view."""
    return row.narrow(0, offset, torch.Size(shape).numel()).view(shape)


def linear(
    x: Tensor, weight: Any, *, n: int, x_scale: Result = None, x_zero: Result = None, bias: Result = None,
    low: Result = None, up: Result = None, gate: Result = None, residual: Result = None, post: Result = None,
    quant: Any = None, act: str = "none", keep: bool = True, dtype: torch.dtype,
) -> tuple[Result, Result]:  # fmt: skip
    """x[…, K] -> (y, q), both […, N] or absent; weight: kernels' Weight; quant: see _quantizer."""
    y, q = kernel("linear", "linear")(
        _codes(_rows(x)), weight, x_scale, x_zero, bias=bias, low=_rows(low), up=up, act=act, gate=_rows(gate),
        residual=_rows(residual), post=post, quant=quant, keep=keep, dtype=dtype,
    )  # fmt: skip
    return _shaped(y, x, n), _shaped(q, x, n)


def normalize(
    x: Tensor, *, norm: str = "none", weight: Result = None, bias: Result = None, epsilon: float = 1e-5,
    act: str = "none", scale: Result = None, shift: Result = None, smooth: Result = None, hadamard: int = 0,
    post: Result = None, quant: Any = None, down: Result = None, keep: bool = True, dtype: torch.dtype,
) -> tuple[Result, Result, Result]:  # fmt: skip
    """x[…, K] -> (y, q, low), […, K] twice and […, r], or absent."""
    width = x.shape[-1]
    y, q, low = kernel("normalize", "normalize")(
        _rows(x), norm=norm, weight=weight, bias=bias, epsilon=epsilon, act=act, scale=_rows(scale),
        shift=_rows(shift), smooth=smooth, hadamard=hadamard, post=post, quant=quant, down=down, keep=keep,
        dtype=dtype,
    )  # fmt: skip
    rank = 0 if down is None else down.shape[-1]
    return _shaped(y, x, width), _shaped(q, x, width), _shaped(low, x, rank)


def rope(x: Tensor, **arguments: Any) -> Tensor:
    """x[B, S, H·D] -> the same, of floats, or with scale[H] codes."""
    found: Tensor = kernel("rope", "rope")(x, **arguments)
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> tuple[Result, Result]:
    found: tuple[Result, Result] = kernel("attention", "attention")(q, k, v, **arguments)
    return found


def quantizer(
    scale: Tensor, zero: Result = None, *, low: int = -128, high: int = 127, dtype: torch.dtype = torch.int8
) -> Any:
    """kernels' Quant, of tensors on the device."""
    return kernel("_quant", "Quant")(scale=scale, zero=zero, low=low, high=high, dtype=dtype)


def prepare(codes: Tensor, scale: Tensor, group: int, kind: str, device: torch.device) -> Any:
    """kernels' Weight."""
    return kernel("_weight", "Weight").prepare(codes, scale, group, kind, device)


def _rows(x: Result) -> Any:
    return None if x is None else x.reshape(-1, x.shape[-1])


def _shaped(x: Result, like: Tensor, width: int) -> Result:
    return None if x is None else x.view(*like.shape[:-1], width)


def _codes(x: Tensor) -> Tensor:
    """Of a standard uint8 quantizer, less 128."""
    return (x.to(torch.int16) - 128).to(torch.int8) if x.dtype == torch.uint8 else x


CALLS: dict[str, Callable[..., Any]] = {"Linear": linear, "Normalize": normalize, "Rope": rope, "Attention": attention}
