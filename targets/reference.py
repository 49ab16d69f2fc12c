"""Every number format and method in plain ONNX: what they cost in quality, on a machine that has kernels for none.

Standard operators of opset 21 on onnxruntime's CPU provider, all arithmetic in float32 on dequantized numbers: exact
for what is measured here, no faster than the float model. Other runtimes' results can be compared with it. It computes
statistics at run time too (parameters per token or channel, MXFP4 activations), which the static targets refuse.

Weights lie in the smallest integer type that ONNX has for them (MXFP4 in int8: twice its numbers do not fit four bits).
Activations of 4 and 6 bits are clamped in uint8: onnxruntime takes no 4-bit value from outside, so bins with 4-bit
zero points could not share a session.
"""

from __future__ import annotations

from pathlib import Path

from vdq_export.errors import UnknownNameError
from vdq_export.plan import QuantPlan
from vdq_export.target_spec import Capability, TargetSpec

NAME = "reference"
PASSES = ("attention_qdq",)
ISA = "any"
_TRIAL = "trial with onnxruntime 1.31.1, CPU provider"
TABLE = (
    Capability(
        subject="MatMul + Add over DequantizeLinear, any bits", supported=True,
        detail="session.disable_quant_qdq=1: weights are dequantized once, when a session is made; speed of float",
        source=_TRIAL,
    ),
    Capability(
        subject="the same with onnxruntime's own Q/DQ fusions", supported=False,
        detail="float activations are silently rounded to 8 bits (MatMulNBits, 0.5 % off), bare MatMuls run in "
        "integers, which saturates without VNNI and fails on block scales", source=_TRIAL,
    ),
    Capability(
        subject="int4, int16 weights; int4 and int8 in blocks of 32, 64, 128", supported=True,
        detail="DequantizeLinear of opset 21", source=_TRIAL,
    ),
    Capability(
        subject="uint4 activations", supported=False,
        detail="run, but no 4-bit array can be fed: 4 bits are clamped in uint8, the same numbers", source=_TRIAL,
    ),
    Capability(
        subject="MXFP4 weights and activations, parameters per token and per channel", supported=True,
        detail="arithmetic in float32, statistics computed at run time", source="its definition",
    ),
    Capability(
        subject="attention: q and k in int8, values in float8e4m3fn, a scale per head", supported=True,
        detail="QuantizeLinear along the heads' axis; the products in float32", source=_TRIAL,
    ),
)  # fmt: skip


def spec(isa: str | None = None) -> TargetSpec:
    """Its numbers do not depend on the instruction set. Raises UnknownNameError for any but "any"."""
    if isa not in (None, ISA):
        raise UnknownNameError("instruction set", str(isa), (ISA,))
    return TargetSpec(
        name=NAME,
        summary="exact arithmetic of every method in plain ONNX, to measure quality; no speed",
        isa=ISA,
        activation_dtype={4: "uint8", 6: "uint8", 8: "uint8", 16: "uint16"},
        weight_dtype={4: "int4", 6: "int8", 8: "int8", 16: "int16"},
        weight_qmax={4: 7, 6: 31, 8: 127, 16: 32767},
        groups=(32, 64, 128),
        grids=("int", "mxfp4"),
        min_rows=2,
        attention=("int8 scores", "fp8 values"),
        dynamic=True,
        isas=(ISA,),
        table=TABLE,
    )


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime session config entries its graphs should run with: no fusion that computes in fewer bits."""
    return {"session.disable_quant_qdq": "1"}


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """None is planned to run in an integer kernel."""
    return {}
