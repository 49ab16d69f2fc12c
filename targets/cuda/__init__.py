"""NVIDIA GPUs: the verified Q/DQ graphs on fused integer and FP8 kernels, all bins in one captured CUDA graph.

graphs/body.* is what onnxruntime verifies; graphs/cuda.NN.onnx holds the bins of one structure in one graph, rewritten
for the kernels (merge.py, then fuse.py) over the same weights, and cuda/programs.json says which bins are its rows.
`vdq_export.load(bundle, device="cuda")` lowers it to torch and Triton (lower.py). 4-bit weights are unpacked in the
kernel: no architecture here multiplies them, so they spare memory, not time. docs/cuda.md explains all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import UnknownNameError
from vdq_export.graph import Graph
from vdq_export.plan import QuantPlan
from vdq_export.progress import Reporter
from vdq_export.target_spec import Capability, TargetSpec

NAME = "cuda"
PASSES = ("ort_rotary", "ort_attention", "attention_qdq")
# Architectures whose kernels can be compiled ahead; all of them, or none: then the GPU's own machine does.
ISAS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
EVERY, NONE = "any", "jit"
_TRIAL = "compiled with triton 3.9.0 for sm_90, run in its interpreter"
_HARDWARE = "PTX ISA, mma and wgmma; no GPU was asked"
TABLE = (
    Capability(
        subject="INT8 activations (asymmetric) x INT8 weights, per channel or in groups", supported=True,
        detail="s8 x s8 in s32, the zero point by column sums; bias, GELU, gate, residual, low-rank branch and the "
        "next quantizer in the same kernel", source=_TRIAL,
    ),
    Capability(
        subject="INT8 or 4-bit activations x INT4 weights, per channel or in groups", supported=True,
        detail="unpacked to 8 bits in the kernel: memory of 4 bits at the speed of 8", source=_TRIAL,
    ),
    Capability(
        subject="FP8 (E4M3) x FP8, static scale per tensor, weight scale per channel", supported=True,
        detail="on Ampere, which has no FP8, multiplied as 16-bit floats", source=_TRIAL,
    ),
    Capability(
        subject="INT4 and INT8 weights, float activations", supported=True,
        detail="dequantized in the kernel", source=_TRIAL,
    ),
    Capability(
        subject="INT4 x INT4 multiplication", supported=False,
        detail="Hopper has no such instruction; Ampere's is not used", source=_HARDWARE,
    ),
    Capability(
        subject="attention: q·k in INT8 per head, values in FP16 or FP8", supported=True,
        detail="static scales from the plan (recipes static-asq-attention …)", source=_TRIAL,
    ),
    Capability(
        subject="parameters per token and per channel", supported=True,
        detail="as torch operators, to compare with; no fused kernel", source=_TRIAL,
    ),
    Capability(
        subject="MXFP4, MXFP8, NVFP4", supported=False,
        detail="block-scaled multiplication is Blackwell's alone: --target tensorrt", source=_HARDWARE,
    ),
)  # fmt: skip


def spec(isa: str | None = None) -> TargetSpec:
    """isa: the architecture whose kernels are compiled ahead, by default each; "jit": none, which takes no Triton.

    Raises UnknownNameError for another one.
    """
    chosen = isa or EVERY
    if chosen not in (EVERY, NONE, *ISAS):
        raise UnknownNameError("GPU architecture", chosen, (EVERY, NONE, *ISAS))
    return TargetSpec(
        name=NAME,
        summary="NVIDIA GPUs: fused INT8, FP8 and 4-bit kernels, one CUDA graph for all bins",
        isa=chosen,
        activation_dtype={4: "uint8", 6: "uint8", 8: "uint8"},
        weight_dtype={4: "int4", 6: "int8", 8: "int8"},
        weight_qmax={4: 7, 6: 31, 8: 127},
        groups=(32, 64, 128),
        grids=("int", "fp8"),
        min_rows=2,
        attention=("int8 scores", "fp8 values"),
        dynamic=True,
        hand_off=True,
        isas=(EVERY, NONE, *ISAS),
        table=TABLE,
    )


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime config entries: its own fusions would compute in fewer bits than the graph says."""
    return {"session.disable_quant_qdq": "1"}


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """onnxruntime's CPU provider only checks the numbers; programs.json counts what the kernels take."""
    return {}


def fused_layers(root: Path, index: int, plan: QuantPlan) -> dict[str, bool]:
    """For each layer of `plan` with quantized inputs: does the program of bin `index` run it fused?

    root: of the bundle. It does where a Linear takes the layer's weight.
    """
    from vdq_export.targets.cuda.programs import linears

    found = linears(root, index)
    return {
        layer.name: layer.name in found
        for layer in plan.of_bins().layers
        if layer.weight is not None and layer.activation_dtype != "float"
    }


def hand_off(writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec, reporter: Reporter) -> None:
    """Write the programs that the GPU runs, and their kernels.

    Raises MissingToolError without Triton unless no kernels are compiled ahead.
    """
    from vdq_export.targets.cuda import build  # torch, which listing targets does without

    archs = {EVERY: ISAS, NONE: ()}.get(spec.isa, (spec.isa,))
    build.write(writer, graphs, archs, reporter)
