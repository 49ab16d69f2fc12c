"""What each graph of a bundle holds and does, and where the bytes of the bundle lie. Weights are not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx
from onnx import NodeProto, TensorProto, helper

from vdq_export.bundle import Bundle
from vdq_export.manifest import PAGE

Extent = tuple[str, int, int]  # file, offset, length
FOR_PEOPLE = ("hand-off files", "reports, for people", "plan and schedule")  # no device loads them
_HELD = 1 << 40  # position of the last reader of what a graph gives


@dataclass(frozen=True)
class GraphCost:
    """One graph. what: "bin", "prompt", "step", "mixed" or "probe". bins: it serves, or it runs ahead of.

    shared_bytes: weights that another graph reads too; own_bytes: those that none does, small constants included.
    multiply_adds: of matrix products and fused attention in one run. peak_bytes: of the values that are alive at once,
    operator by operator as the graph stands: an engine that fuses needs less, one that copies more.
    """

    path: str
    what: str
    bins: tuple[int, ...]
    nodes: int
    shared_bytes: int
    own_bytes: int
    multiply_adds: int
    peak_bytes: int


@dataclass(frozen=True)
class Storage:
    """Bytes of the bundle's files by what they are for, largest first; they add up to the bundle's size."""

    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class _Read:
    """A graph file as far as it matters here."""

    cost: GraphCost
    extents: tuple[Extent, ...]


def measure(bundle: Bundle) -> tuple[tuple[GraphCost, ...], Storage]:
    """The graphs in the order of bins, then those that run ahead, then probes; and where the bytes are."""
    read = [_read(bundle, path, what, bins) for path, (what, bins) in _graphs(bundle).items()]
    readers: dict[Extent, list[GraphCost]] = {}
    for one in read:
        for extent in one.extents:
            readers.setdefault(extent, []).append(one.cost)
    costs = []
    for one in read:
        shared = sum(extent[2] for extent in one.extents if len(readers[extent]) > 1)
        own = sum(extent[2] for extent in one.extents) - shared + one.cost.own_bytes
        costs.append(_with(one.cost, shared, own))
    return tuple(costs), Storage(parts=_storage(bundle, readers))


def _with(cost: GraphCost, shared: int, own: int) -> GraphCost:
    return GraphCost(**{**vars(cost), "shared_bytes": shared, "own_bytes": own})


def _graphs(bundle: Bundle) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{bundle path: (what it is, its bins)}; a graph that several bins run stands once."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index, one in enumerate(bundle.schedule.bins):
        found[one.graph] = ("bin", (*found.get(one.graph, ("", ()))[1], index))
    for hoisted in bundle.schedule.hoisted:
        ahead = {"prompt": hoisted.prompt, "step": hoisted.step, "mixed": hoisted.mixed}
        found |= {path: (what, hoisted.bins) for what, path in ahead.items() if path}
    if bundle.schedule.reuse is not None:
        found |= {one.graph: ("probe", ()) for one in bundle.schedule.reuse.probes}
    return found


def _read(bundle: Bundle, path: str, what: str, bins: tuple[int, ...]) -> _Read:
    graph = _described(onnx.load(str(bundle.path / path), load_external_data=False)).graph
    folder, inline, extents = path.rpartition("/")[0], 0, dict[Extent, None]()
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            fields = {item.key: item.value for item in tensor.external_data}
            place = f"{folder}/{fields['location']}"
            extents[place, int(fields.get("offset", 0)), int(fields.get("length", _nbytes(tensor)))] = None
        else:
            inline += _nbytes(tensor)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
        sizes[value.name] = _bytes(kind.elem_type, shapes[value.name])
    cost = GraphCost(
        path=path,
        what=what,
        bins=bins,
        nodes=len(graph.node),
        shared_bytes=0,
        own_bytes=inline,
        multiply_adds=sum(multiply_adds(node, shapes) for node in graph.node),
        peak_bytes=_peak(graph, sizes),
    )
    return _Read(cost, tuple(extents))


def _described(model: onnx.ModelProto) -> onnx.ModelProto:
    """With the types of all values, as far as ONNX can tell; our own exporter writes them all."""
    known = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    if known.issuperset(name for node in model.graph.node for name in node.output if name):
        return model
    return onnx.shape_inference.infer_shapes(model)


def _storage(bundle: Bundle, readers: Mapping[Extent, Sequence[GraphCost]]) -> tuple[tuple[str, int], ...]:
    sums: dict[str, int] = {}
    for (_, _, length), costs in readers.items():
        name = _weights_of(costs)
        sums[name] = sums.get(name, 0) + length
    stores = {place for place, _, _ in readers}
    told = sum(sums.values())
    for entry in bundle.manifest.files:
        if entry.path not in stores and entry.path != PAGE:
            name = _kind(entry.path)
            sums[name] = sums.get(name, 0) + entry.size
    padding = sum(e.size for e in bundle.manifest.files if e.path in stores) - told
    if padding > 0:
        sums["alignment to memory pages"] = padding
    return tuple(sorted(sums.items(), key=lambda item: -item[1]))


def _weights_of(costs: Sequence[GraphCost]) -> str:
    """Which graphs read one stored tensor, in words."""
    if any(one.what != "bin" for one in costs):
        return "weights of what runs ahead or beside (prompt, step, mixed, probe)"
    if len({index for one in costs for index in one.bins}) > 1:
        return "weights that bins share"
    return "weights of one bin alone"


def _kind(path: str) -> str:
    if path.endswith(".onnx") and path.startswith("graphs/"):
        return "graphs, with scales and small constants"
    kinds = {
        "tables/": "tables of the steps",
        "handoff/": "hand-off files",
        "contexts/": "compiled contexts",
        "cuda/": "compiled kernels",
        "report/": "reports, for people",
    }
    named = next((what for folder, what in kinds.items() if path.startswith(folder)), "")
    return named or "plan and schedule"


def _nbytes(tensor: TensorProto) -> int:
    return _bytes(tensor.data_type, tensor.dims)


def _bytes(kind: int, shape: Iterable[int]) -> int:
    """Four-bit types take half a byte."""
    count = prod(shape)
    if TensorProto.DataType.Name(kind).endswith("INT4") or kind == getattr(TensorProto, "FLOAT4E2M1", -1):
        return -(-count // 2)
    return count * int(helper.tensor_dtype_to_np_dtype(kind).itemsize) if kind else 0


def multiply_adds(node: NodeProto, shapes: Mapping[str, Sequence[int]]) -> int:
    """Multiply-adds of one run of a matrix product, convolution or fused attention; 0 for others and unknown shapes."""
    known = [shapes.get(name, ()) for name in node.input]
    made = prod(shapes[node.output[0]]) if shapes.get(node.output[0]) else 0
    if not made or not known or not known[0]:
        return 0
    if node.op_type in ("MatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulNBits"):
        return made * known[0][-1]
    if node.op_type == "Gemm":
        transposed = any(one.name == "transA" and one.i for one in node.attribute)
        return made * known[0][0 if transposed else 1]
    if node.op_type == "Conv" and len(known) > 1 and known[1]:
        return made * prod(known[1][1:])
    if node.op_type == "MultiHeadAttention" and len(known) > 1 and len(known[1]) >= 3:
        keys = known[1][-2] if len(known[1]) == 4 else known[1][1]
        return 2 * made * keys  # scores, and what they weigh
    return 0


def _peak(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> int:
    """Most bytes of inputs and values alive at once, in the order of the file; weights made float are weights."""
    constant = {tensor.name for tensor in graph.initializer}
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: _HELD for value in graph.output}
    alive = {value.name: sizes.get(value.name, 0) for value in graph.input}
    total = peak = sum(alive.values())
    for place, node in enumerate(graph.node):
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
            continue
        made = {name: sizes.get(name, 0) for name in node.output if name}
        alive |= made
        total += sum(made.values())
        peak = max(peak, total)
        for name in {*node.input, *made}:
            if name in alive and last.get(name, place) <= place:
                total -= alive.pop(name)
    return peak
