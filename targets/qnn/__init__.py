"""Qualcomm Hexagon (HTP): QDQ ONNX in which every operator is quantized, for QNN's compiler.

Activations in 16 bits by default, weights in 8 or 4 bits per output channel, attention operands symmetric in 16 bits;
standard operators of rank 5 and less, static shapes. Inputs and outputs of the graphs stay float: their Q/DQ is inside,
so that all bins have one signature. The rows below were tried with the compiler and the emulator that onnxruntime-qnn
carries; the whole table, row by row with its trial, is targets/tables/qnn.toml, which `vdq-export lint` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import UnknownNameError
from vdq_export.graph import Graph
from vdq_export.handoff.encodings import write_encodings
from vdq_export.plan import QuantPlan
from vdq_export.progress import Reporter
from vdq_export.target_spec import Capability, TargetSpec

NAME = "qnn"
FORMS = ("rank_limit", "square", "flat_rows", "mask_bias", "float_masks", "gather_rows", "batch_broadcast")
PASSES = ()
ARCHS = ("v73", "v75", "v79", "v81")
_TRIAL = "trial with onnxruntime-qnn 2.7.0, HTP emulator"
TABLE = (
    Capability(
        subject="u16 or u8 activations x s8 or s4 weights per output channel", supported=True,
        detail="MatMul, Gemm, Conv", source=_TRIAL,
    ),
    Capability(
        subject="u16 activations x s4 weights in groups of 16, 32 or 64", supported=False,
        detail="accepted; the weights are dequantized and the product runs in float", source=_TRIAL,
    ),
    Capability(
        subject="products of two activations in u16", supported=False,
        detail="accepted, but the second one is silently rounded to 8 bits: it is emitted in symmetric s16",
        source=_TRIAL,
    ),
    Capability(
        subject="LayerNormalization gamma in s8", supported=False, detail="refused; u8 passes", source=_TRIAL,
    ),
    Capability(
        subject="activations computed at run time, 4- and 6-bit activations", supported=False,
        detail="the HTP has 8- and 16-bit integers and no statistics", source=_TRIAL,
    ),
)  # fmt: skip


def spec(isa: str | None = None) -> TargetSpec:
    """isa: the HTP architecture; graphs are the same for all of them. Raises UnknownNameError for another one."""
    chosen = isa or "v75"
    if chosen not in ARCHS:
        raise UnknownNameError("HTP architecture", chosen, ARCHS)
    return TargetSpec(
        name=NAME,
        summary="Qualcomm Hexagon NPUs: every operator quantized, 16-bit activations, 8- or 4-bit weights",
        isa=chosen,
        activation_dtype={8: "uint8", 16: "uint16"},
        weight_dtype={4: "int4", 8: "int8"},
        weight_qmax={4: 7, 8: 127},
        scale_span=2.0**14,  # half of what was still right: beyond 2^15 a whole output is garbage
        groups=(16, 32, 64),
        min_rows=1,
        hand_off=True,
        every_operator=True,
        default_activations=16,
        isas=ARCHS,
        table=TABLE,
    )


def hand_off(writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec, reporter: Reporter) -> None:
    """AIMET encodings of every bin, for the converters of Qualcomm's own SDK."""
    write_encodings(writer, {PurePosixPath(path).stem: graph for path, graph in graphs.items()})


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime's own fusions would round what the HTP does not; without them its CPU results are the exact ones."""
    return {"session.disable_quant_qdq": "1"}


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """onnxruntime's CPU provider only checks the numbers; on the HTP every planned operator runs in integers."""
    return {}
