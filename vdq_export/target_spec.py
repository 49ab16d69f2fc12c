"""What a deployment target can do, as data. Each file in targets/ fills one of these in; solvers and passes read it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vdq_export.plan import IntType
from vdq_export.recipe import AttentionKind, NumberFormat


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a target's table: what is (not) supported, and how we know (`source`: document or trial, version)."""

    subject: str
    supported: bool
    detail: str
    source: str


class TargetSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A target and, where it matters, the instruction set it is compiled for.

    activation_dtype, weight_dtype: bits -> ONNX integer type. weight_qmax: largest |q| of a weight (63 where the
    kernel's 16-bit pair sum would saturate). scale_span: the largest over the smallest weight scale that a layer may
    have; 0: any. integer: (activation, weight) types that one kernel multiplies; the others run dequantized. groups:
    weight group sizes; weights of `group_only` bits exist in groups alone. grids: number formats of recipes it has;
    refused: why it lacks others. pairs: (weights, activations) it multiplies, named "int8", "int4", "fp8" …, or
    "float"; (): any. symmetric_activations: zero points are 0. dynamic: may compute statistics at run time. min_rows:
    linears over fewer rows stay float. attention: what it has of AttentionRecipe.kinds. hand_off: for another
    toolchain, so handoff/ is written. every_operator: values between linears are quantized too (QuantPlan.values).
    default_activations: bits of activations unless the caller says otherwise; 0: the recipe's.
    """

    name: str
    summary: str
    isa: str
    opset: Annotated[int, Meta(ge=19)] = 21
    activation_dtype: dict[int, IntType]
    weight_dtype: dict[int, IntType]
    weight_qmax: dict[int, int]
    scale_span: float = 0.0
    integer: tuple[tuple[IntType, IntType], ...] = ()
    groups: tuple[int, ...] = ()
    group_only: tuple[int, ...] = ()
    grids: tuple[NumberFormat, ...] = ("int",)
    refused: dict[NumberFormat, str] = {}
    pairs: tuple[tuple[str, str], ...] = ()
    symmetric_activations: bool = False
    min_rows: int = 2
    dynamic: bool = False
    attention: tuple[AttentionKind, ...] = ()
    hand_off: bool = False
    every_operator: bool = False
    default_activations: Literal[0, 8, 16] = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    isas: tuple[str, ...] = ()
    table: tuple[Capability, ...] = ()
    format: Literal[1] = 1
