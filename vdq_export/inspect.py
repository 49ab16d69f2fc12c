"""What is in an ONNX file or a bundle: operators, sizes, how much of it is quantized."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from safetensors import safe_open

from vdq_export.bundle import Bundle
from vdq_export.graphs import view as graph_view
from vdq_export.graphs.view import GraphView, Op
from vdq_export.manifest import MANIFEST
from vdq_export.schedule import Hoisted

# Operators that multiply by a weight -> the slot it is in; the integer ones are quantized by what they are.
FLOAT_LINEARS = {"MatMul": 1, "Gemm": 1}
INTEGER_LINEARS = {
    "QLinearMatMul": 3, "MatMulInteger": 1, "com.microsoft::QGemm": 3, "com.microsoft::MatMulNBits": 1,
    "com.microsoft::DynamicQuantizeMatMul": 1, "com.microsoft::MatMulIntegerToFloat": 1,
}  # fmt: skip
_THROUGH = {"DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast"}  # between a weight and its linear


class GraphSummary(msgspec.Struct, frozen=True):
    """`inputs`, `outputs`: name -> dtype[shape]; `param_bytes` by dtype, a tensor that many read counted once."""

    name: str
    opsets: dict[str, int]
    inputs: dict[str, str]
    outputs: dict[str, str]
    ops: dict[str, int]
    param_bytes: dict[str, int]
    linears: int
    linears_quantized: int


class ScaleSpread(msgspec.Struct, frozen=True):
    """One activation quantizer over the bins; `ratio` is the largest scale over the smallest."""

    where: str
    scales: tuple[float, ...]
    ratio: float


class AheadSummary(msgspec.Struct, frozen=True):
    """What runs ahead of the graphs of `bins`: graphs by path, and `rows` of `values` tables, `table_bytes` in all."""

    bins: tuple[int, ...]
    graphs: tuple[str, ...]
    tables: str
    rows: int
    values: int
    table_bytes: int


class Summary(msgspec.Struct, frozen=True):
    """`size`: bytes of all files of a bundle, or of the .onnx file with its external data. `scales`: widest first."""

    path: str
    what: str
    size: int
    graphs: tuple[GraphSummary, ...]
    scales: tuple[ScaleSpread, ...] = ()
    ahead: tuple[AheadSummary, ...] = ()
    model: str = ""
    target: str = ""
    recipe: str = ""

    def to_json(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


def summarize(path: Path) -> Summary:
    """Summary of an .onnx file or a bundle folder. Raises VdqError when it is neither, or damaged."""
    if not (path / MANIFEST).is_file():
        view = graph_view.load(path)
        size = path.stat().st_size + sum(p.nbytes for p in view.params.values() if p.external)
        return Summary(str(path), "graph", size, (summarize_view(view, path.name),))
    bundle = Bundle.open(path, verify_hashes=False)
    digests: graph_view.Digests = {}
    files = bundle_graphs(bundle).items()
    views = {label: graph_view.load(file, root=bundle.path, digests=digests) for label, file in files}
    alike: dict[str, list[GraphView]] = {}  # scales of other experts or precisions are no spread over timesteps
    for one, label in zip(bundle.schedule.bins, views, strict=False):
        alike.setdefault(".".join(filter(None, (one.when.expert, one.when.precision))), []).append(views[label])
    return Summary(
        path=str(path),
        what="bundle",
        size=bundle.size,
        graphs=tuple(summarize_view(view, label) for label, view in views.items()),
        ahead=tuple(_ahead(bundle, one) for one in bundle.schedule.hoisted),
        scales=tuple(spread for kind, bins in alike.items() for spread in scale_spread(bins, kind)),
        model=bundle.manifest.model.name,
        target=bundle.manifest.target,
        recipe=bundle.manifest.recipe.name if bundle.manifest.recipe else "",
    )


def bundle_graphs(bundle: Bundle) -> dict[str, Path]:
    """Graph files by what they are for: bins by number, others by path; not what was compiled of them."""
    found = {f"bin{index:02d}": bundle.graph_path(index) for index in range(len(bundle.schedule.bins))}
    bins = {one.graph for one in bundle.schedule.bins}
    listed = [entry.path for entry in bundle.manifest.files if entry.path.endswith(".onnx")]
    paths = [path for path in listed if not path.startswith("contexts/")]
    return found | {path: bundle.path / path for path in paths if path not in bins}


def _ahead(bundle: Bundle, hoisted: Hoisted) -> AheadSummary:
    values, entry = 0, bundle.manifest.file(hoisted.tables)
    if entry is not None:
        with safe_open(bundle.path / hoisted.tables, framework="numpy") as tables:
            values = len(tables.keys())
    size = entry.size if entry else 0
    return AheadSummary(hoisted.bins, hoisted.graphs, hoisted.tables, len(hoisted.timesteps), values, size)


def summarize_view(view: GraphView, name: str) -> GraphSummary:
    sizes: Counter[str] = Counter()
    for param in view.params.values():
        sizes[param.type.dtype] += param.nbytes
    makers = {value: op for op in view.ops for value in op.outputs}
    kinds = [kind for op in view.ops if (kind := _linear(view, op, makers)) is not None]
    return GraphSummary(
        name=name,
        opsets=view.opsets,
        inputs={value: str(view.types.get(value, "?")) for value in view.inputs},
        outputs={value: str(view.types.get(value, "?")) for value in view.outputs},
        ops=dict(Counter(op.type for op in view.ops).most_common()),
        param_bytes=dict(sizes.most_common()),
        linears=len(kinds),
        linears_quantized=sum(kinds),
    )


def _linear(view: GraphView, op: Op, makers: dict[str, Op]) -> bool | None:
    """Is the linear `op` quantized? None when it is no linear: no product with a constant."""
    slot = FLOAT_LINEARS.get(op.type, INTEGER_LINEARS.get(op.type))
    if slot is None or slot >= len(op.inputs):
        return None
    value, quantized = op.inputs[slot], op.type in INTEGER_LINEARS
    while value in makers and makers[value].type in _THROUGH:
        quantized |= makers[value].type == "DequantizeLinear"
        value = makers[value].inputs[0]
    return quantized if value in view.params else None


def scale_spread(bins: list[GraphView], kind: str = "") -> tuple[ScaleSpread, ...]:
    """Scales of the QuantizeLinear nodes that every bin has under one name. kind: expert and precision of the bins."""
    found: dict[str, list[float]] = {}
    for view in bins:
        for op in view.ops:
            scale = view.params.get(op.inputs[1]) if op.type == "QuantizeLinear" else None
            if scale is not None and scale.elements == 1:
                found.setdefault(op.name, []).append(float(np.asarray(scale.array(), np.float64).reshape(())))
    spreads = [
        ScaleSpread(f"{kind}: {name}" if kind else name, tuple(scales), max(scales) / min(scales))
        for name, scales in found.items()
        if len(scales) == len(bins) > 1 and min(scales) > 0
    ]
    return tuple(sorted(spreads, key=lambda one: (-one.ratio, one.where)))
