"""NVIDIA TensorRT: strongly typed QDQ ONNX by its published rules.

Everything TensorRT runs in low precision says so in the graph: Q/DQ in symmetric INT8 or FP8, INT4 weights in groups,
NVFP4 and MXFP8 with its own operators, whose bodies the file carries. graphs/ has float parts in FP32 and is what
onnxruntime verifies; handoff/tensorrt/ has the same graphs in the types that TensorRT is to run. No GPU has been asked:
the rules are those of NVIDIA's documentation and of its ONNX parser's source, row by row with their source in
targets/tables/tensorrt.toml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import UnknownNameError
from vdq_export.graph import Graph
from vdq_export.plan import QuantPlan
from vdq_export.progress import Reporter
from vdq_export.target_spec import Capability, TargetSpec
from vdq_export.targets._tensorrt_types import HALF, four_bits, half
from vdq_export.weights.store import WeightStore

NAME = "tensorrt"
FORMS = ()
PASSES = ()
ISAS = (*HALF, "fp32")  # of the float parts
FOLDER = "handoff/tensorrt"
WEIGHTS = "weights/weights.bin"
_SCHEMES = "TensorRT 11.3, Quantization Schemes"
_PARSER = "onnx-tensorrt, onnxOpImporters.cpp"
_NO_MXFP4 = (
    "TensorRT's documentation has no MXFP4: FP4 comes in blocks of 16 with E4M3 scales (NVFP4), and its ONNX parser "
    "takes E8M0 scales for FP8 numbers alone"
)
TABLE = (
    Capability(
        subject="INT8 activations per tensor x INT8 weights per output channel", supported=True,
        detail="signed and symmetric, zero points 0, range -128 … 127", source=_SCHEMES,
    ),
    Capability(
        subject="UINT8, other zero points than 0", supported=False,
        detail="refused by the parser outside of DLA", source=_PARSER,
    ),
    Capability(
        subject="FP8 (E4M3FN) activations per tensor x FP8 weights per output channel", supported=True,
        detail="static scales; Ada, Hopper and later", source=_SCHEMES,
    ),
    Capability(
        subject="INT4 weights in groups of 64 or 128, float activations", supported=True,
        detail="weights alone; the block dimension is one of the last two", source=_SCHEMES,
    ),
    Capability(
        subject="NVFP4: blocks of 16, E4M3 scales, one float scale", supported=True,
        detail="activation blocks at run time (TRT_FP4DynamicQuantize), their float scale static; Blackwell",
        source=_SCHEMES,
    ),
    Capability(
        subject="MXFP8: blocks of 32, E8M0 scales", supported=True,
        detail="activation blocks at run time (TRT_MXFP8DynamicQuantize); Blackwell", source=_SCHEMES,
    ),
    Capability(subject="MXFP4", supported=False, detail=_NO_MXFP4, source=f"{_SCHEMES}; {_PARSER}"),
)  # fmt: skip


def spec(isa: str | None = None) -> TargetSpec:
    """isa: the type of the float parts in handoff/, by default FP16. Raises UnknownNameError for another one."""
    chosen = isa or ISAS[0]
    if chosen not in ISAS:
        raise UnknownNameError("type of the float parts", chosen, ISAS)
    return TargetSpec(
        name=NAME,
        summary="NVIDIA GPUs: strongly typed QDQ ONNX for TensorRT, INT8, FP8, INT4 weights, NVFP4 or MXFP8",
        isa=chosen,
        activation_dtype={8: "int8"},
        weight_dtype={4: "int4", 8: "int8"},
        weight_qmax={4: 7, 8: 127},
        groups=(64, 128),
        group_only=(4,),
        grids=("int", "fp8", "nvfp4", "mxfp8"),
        refused={"mxfp4": _NO_MXFP4},
        pairs=(
            ("int8", "int8"),
            ("fp8", "fp8"),
            ("int4", "float"),
            ("nvfp4", "nvfp4"),
            ("nvfp4", "float"),
            ("mxfp8", "mxfp8"),
        ),
        symmetric_activations=True,
        dynamic=True,
        hand_off=True,
        isas=ISAS,
        table=TABLE,
    )


def hand_off(
    writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec, reporter: Reporter
) -> dict[str, Graph]:
    """handoff/tensorrt/: the graphs in TensorRT's types over one weight file, and the commands that build engines."""
    handed = {}
    with WeightStore(writer.file(f"{FOLDER}/{WEIGHTS}"), WEIGHTS) as store:
        for path, verified in graphs.items():
            graph = verified.copy()
            if spec.isa in HALF:
                half(graph, spec.isa)
            four_bits(graph)
            proto, arrays = graph.skeleton()
            store.externalise(proto, arrays)
            name = f"{FOLDER}/{PurePosixPath(path).stem}.onnx"
            writer.add_file(name, proto.SerializeToString(deterministic=True))
            handed[name] = graph
    writer.add_file(f"{FOLDER}/build.sh", _commands(handed).encode())
    return handed


def _commands(graphs: Mapping[str, Graph]) -> str:
    """docs/handoff-tensorrt.md explains them."""
    names = [PurePosixPath(path).stem for path in graphs]
    lines = [f"trtexec --onnx={name}.onnx --stronglyTyped --saveEngine={name}.engine" for name in names]
    return "\n".join(["#!/bin/sh -e", 'cd "$(dirname "$0")"', *lines, ""])


def session_options(spec: TargetSpec) -> dict[str, str]:
    """onnxruntime config entries: its own fusions would compute in fewer bits than the graph says."""
    return {"session.disable_quant_qdq": "1"}


def integer_layers(optimised_model: Path, plan: QuantPlan) -> dict[str, bool]:
    """onnxruntime's CPU provider only checks the numbers."""
    return {}
