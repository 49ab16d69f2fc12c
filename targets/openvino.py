"""OpenVINO on x86 CPUs and Intel NPUs: Q/DQ ONNX of standard operators, linears in 8-bit integers.

Linears are Q/DQ around Gemm with an int32 bias, what ort-int8 has too: OpenVINO's CPU plugin runs each of them in an
integer kernel, and so does onnxruntime, which the same graphs are verified with. What it does otherwise than the graphs
say, each row below with its trial, is kept out: weights stay within ±63 unless the processor is known to add products
in 32 bits, 16-bit activations are not offered, and SETTINGS, written to handoff/openvino.json, turn off the rounding
that it does on its own. What vdq-export lint asks is targets/tables/openvino.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from vdq_export.bundle_writer import BundleWriter
from vdq_export.devices.openvino_runtime import SETTINGS
from vdq_export.errors import UnknownNameError
from vdq_export.graph import Graph
from vdq_export.jsonfile import encode
from vdq_export.plan import IntType, QuantPlan
from vdq_export.progress import Reporter
from vdq_export.target_spec import Capability, TargetSpec
from vdq_export.targets import _onnxruntime

NAME = "openvino"
PASSES = ()
# Instruction set -> largest |q| of a weight. avx2 stands for every processor without VNNI, AVX-512 or not.
WEIGHT_QMAX = {"avx2": 63, "avx_vnni": 127, "avx512_vnni": 127, "npu": 127}
INTEGER: tuple[tuple[IntType, IntType], ...] = (("uint8", "int8"),)
HANDOFF = "handoff/openvino.json"
TRIED = "2026.4.1"
_TRIAL = f"trial with openvino {TRIED}, CPU plugin"
TABLE = (
    Capability(
        subject="Gemm or MatMul u8 x s8, weight per channel or per tensor, any bias", supported=True,
        detail="integer kernel, float output, exact", source=_TRIAL,
    ),
    Capability(
        subject="u8 or s8 x s8 with |weight| > 63 without VNNI", supported=False,
        detail="16-bit pair sums saturate silently, with AVX2 and with AVX-512: one linear 27 dB instead of 131; "
        "exact within 63", source=f"{_TRIAL}, ONEDNN_MAX_CPU_ISA=AVX2 and AVX512_CORE",
    ),
    Capability(
        subject="16-bit activations", supported=False,
        detail="Q/DQ is dropped with its clamp, values outside the range pass", source=_TRIAL,
    ),
    Capability(
        subject="4- and 6-bit activations behind a Clip in u8, 4- and 6-bit weights in s8", supported=True,
        detail="integer kernel, at the speed and size of 8 bits", source=_TRIAL,
    ),
    Capability(
        subject="s4, u8, s16 weights, weights with zero points, scales on input channels", supported=False,
        detail="right, but in a float kernel: 4 bits are kept in s8", source=_TRIAL,
    ),
    Capability(
        subject="weights in groups of 32, 64, 128", supported=False,
        detail="right in a float kernel with EXECUTION_MODE_HINT=ACCURACY; without it inputs are rounded at run time "
        "(48 dB), and without VNNI the graph is refused", source=_TRIAL,
    ),
    Capability(
        subject="float operators beside the linears", supported=True,
        detail="bfloat16 where the processor has it, 1-3 dB lost on whole models; float32 with "
        "EXECUTION_MODE_HINT=ACCURACY", source=_TRIAL,
    ),
    Capability(
        subject="com.microsoft operators of onnxruntime (RotaryEmbedding, MultiHeadAttention)", supported=False,
        detail="RotaryEmbedding is refused: graphs have standard operators only", source=_TRIAL,
    ),
    Capability(
        subject="Intel NPU", supported=False,
        detail="not tried, nothing is promised: its compiler does not load without the driver", source=_TRIAL,
    ),
)  # fmt: skip


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """handoff/openvino.json: `settings` to compile each of `graphs` with, tried with version `tried` on `device`."""

    tool: str
    tried: str
    device: str
    settings: dict[str, str]
    graphs: tuple[str, ...]


def spec(isa: str | None = None) -> TargetSpec:
    """isa: of the processor that will run it; "avx2" is right on every x86. Raises UnknownNameError for another one."""
    chosen = isa or "avx2"
    if chosen not in WEIGHT_QMAX:
        raise UnknownNameError("instruction set", chosen, WEIGHT_QMAX)
    return TargetSpec(
        name=NAME,
        summary="OpenVINO on x86 CPUs (Intel NPUs: not tried), static 8-bit integer linears",
        isa=chosen,
        activation_dtype={4: "uint8", 6: "uint8", 8: "uint8"},
        weight_dtype={4: "int8", 6: "int8", 8: "int8"},
        weight_qmax={4: 7, 6: 31, 8: WEIGHT_QMAX[chosen]},
        integer=INTEGER,
        groups=(32, 64, 128),
        min_rows=2,
        hand_off=True,
        isas=tuple(WEIGHT_QMAX),
        table=TABLE,
    )


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime's own: its integer kernels take the same form."""
    return {}


def hand_off(writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec, reporter: Reporter) -> None:
    """Write the settings that every graph is to be compiled with."""
    recipe = Recipe(tool=NAME, tried=TRIED, device="CPU", settings=SETTINGS, graphs=tuple(sorted(graphs)))
    writer.add_file(HANDOFF, encode(recipe, HANDOFF))


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """For each layer planned in integers: does onnxruntime run it so? openvino_runtime asks OpenVINO itself."""
    return _onnxruntime.integer_layers(optimised_model, plan, INTEGER)
