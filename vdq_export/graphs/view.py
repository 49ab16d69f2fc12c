"""A read-only look at an ONNX file for people and comparisons: operators, values, parameters by hash. Never edits.

Weights in external data are streamed, never loaded whole: a view of a 30 GB model costs the graph and one buffer.
`Constant` nodes are shown as parameters, since whether a constant is a node or an initializer changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import networkx as nx
import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

from vdq_export import onnx_file
from vdq_export.errors import VdqError

CHUNK = 1 << 20
INPUT, OUTPUT = "<input>", "<output>"  # the pseudo operators that stand for the graph's own inputs and outputs
_SHORT = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64"}
_CONSTANT_VALUES = {"value_float", "value_int", "value_floats", "value_ints", "value_string", "value_strings"}

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorType:
    """dtype as f32, f16, uint8 …; shape with a name or "?" where a dimension is not static, None when unknown."""

    dtype: str
    shape: Shape | None

    def __str__(self) -> str:
        return self.dtype if self.shape is None else f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Param:
    """A constant tensor. `digest` is the sha256 of its raw little-endian bytes."""

    name: str
    type: TensorType
    digest: str
    nbytes: int
    external: bool
    _load: Callable[[], np.ndarray] = field(repr=False, compare=False)

    @property
    def elements(self) -> int:
        return prod(int(d) for d in self.type.shape or ())

    def array(self) -> np.ndarray:
        """The values, read now."""
        return self._load()


@dataclass(frozen=True)
class Op:
    """One operator. `type` has its domain in front unless it is ONNX's own; `attrs` are texts that compare by value."""

    name: str
    type: str
    attrs: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]  # "" where an optional input is absent
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class GraphView:
    """`ops` are in topological order, ties by name: the order of nodes in the file does not matter."""

    origin: str
    opsets: dict[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: dict[str, TensorType]
    params: dict[str, Param]
    ops: tuple[Op, ...]

    def network(self) -> nx.MultiDiGraph:
        """Operators (integers: inputs first, then `ops`, then outputs) and values (names); edges keyed by slot."""
        ends_in = [Op(name, INPUT, (), (), (name,)) for name in self.inputs]
        ends_out = [Op(name, OUTPUT, (), (name,), ()) for name in self.outputs]
        network = nx.MultiDiGraph()
        for index, op in enumerate([*ends_in, *self.ops, *ends_out]):
            network.add_node(index, op=op)
            network.add_edges_from((value, index, slot) for slot, value in enumerate(op.inputs) if value)
            network.add_edges_from((index, value, slot) for slot, value in enumerate(op.outputs) if value)
        return network


Digests = dict[tuple[Path, int, int], str]


def load(path: Path, *, root: Path | None = None, digests: Digests | None = None) -> GraphView:
    """View of the ONNX file at `path`.

    External data must lie inside `root` (default: the bundle the file is part of, else its own folder). `digests`
    remembers hashes of external data, so that graphs sharing a weight store hash it once. Raises VdqError when it is
    no usable graph.
    """
    proto = onnx_file.read(path)
    if root is None:
        in_bundle = (path.parent.parent / "manifest.json").is_file()
        root = path.parent.parent if in_bundle else path.parent
    return from_proto(proto, str(path), folder=path.parent, root=root, digests=digests)


def from_proto(
    proto: onnx.ModelProto,
    origin: str = "graph",
    *,
    folder: Path | None = None,
    root: Path | None = None,
    digests: Digests | None = None,
) -> GraphView:
    """View of a model in memory; `folder` is where its external data lies. Raises VdqError like `load`."""
    graph = proto.graph
    reader = _Reader(origin, folder, root or folder, {} if digests is None else digests)
    params = {tensor.name: reader.param(tensor, tensor.name) for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        raise VdqError(f"{origin}: sparse initializer {sparse.values.name!r}", hint="store it dense")
    functions = {(f.domain, f.name): _digest(f.SerializeToString(deterministic=True)) for f in proto.functions}
    ops: list[Op] = []
    for node in graph.node:
        tensor = _constant(node)
        if tensor is not None:
            params[node.output[0]] = reader.param(tensor, node.output[0])
        else:
            ops.append(_op(node, functions))
    inputs = tuple(value.name for value in graph.input if value.name not in params)
    described = [*graph.input, *graph.value_info, *graph.output]
    return GraphView(
        origin=origin,
        opsets={one.domain or "ai.onnx": one.version for one in proto.opset_import},
        inputs=inputs,
        outputs=tuple(value.name for value in graph.output),
        types={v.name: t for v in described if (t := _type(v.type)) is not None},
        params=params,
        ops=_sorted(ops, {*inputs, *params}, [v.name for v in graph.output], origin),
    )


def dtype_name(elem_type: int) -> str:
    """Short name of a TensorProto.DataType."""
    name = str(TensorProto.DataType.Name(elem_type)).lower()
    return _SHORT.get(name, name)


def _type(proto: onnx.TypeProto) -> TensorType | None:
    if not proto.HasField("tensor_type"):
        return None
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(dtype_name(tensor.elem_type), None)
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
    return TensorType(dtype_name(tensor.elem_type), dims)


def _op(node: NodeProto, functions: dict[tuple[str, str], str]) -> Op:
    attrs = sorted((a.name, _attribute(a)) for a in node.attribute)
    function = functions.get((node.domain, node.op_type))
    if function is not None:  # a function of the model's own: its body is part of what the node is
        attrs.append(("<function>", function[:12]))
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
    name = node.name or next((o for o in node.output if o), node.op_type)
    return Op(name, domain + node.op_type, tuple(attrs), tuple(node.input), tuple(node.output))


def _attribute(attribute: AttributeProto) -> str:
    if attribute.type in (AttributeProto.TENSOR, AttributeProto.GRAPH, AttributeProto.GRAPHS, AttributeProto.TENSORS):
        # Subgraphs compare by their bytes, names included: static graphs have none, so no more is spent on them.
        return "sha256:" + _digest(attribute.SerializeToString(deterministic=True))[:12]
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, float):
        return f"{value:.9g}"
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return "[" + ",".join(f"{item:.9g}" if isinstance(item, float) else str(item) for item in value) + "]"
    return str(value)


def _constant(node: NodeProto) -> TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    if attribute.name not in _CONSTANT_VALUES:
        return None
    value = helper.get_attribute_value(attribute)
    kind = {"float": np.float32, "floats": np.float32, "int": np.int64, "ints": np.int64}
    return numpy_helper.from_array(np.array(value, dtype=kind.get(attribute.name.removeprefix("value_"), np.object_)))


def _sorted(ops: list[Op], known: set[str], outputs: list[str], origin: str) -> tuple[Op, ...]:
    made: dict[str, int] = {}
    for index, op in enumerate(ops):
        for value in filter(None, op.outputs):
            if value in made or value in known:
                raise VdqError(f"{origin}: value {value!r} is made twice (by {op.name})")
            made[value] = index
    order = nx.DiGraph()
    order.add_nodes_from(range(len(ops)))
    for index, op in enumerate(ops):
        for value in filter(None, op.inputs):
            if value in made:
                order.add_edge(made[value], index)
            elif value not in known:
                raise VdqError(f"{origin}: {op.name} reads {value!r}, which nothing makes")
    missing = [value for value in outputs if value not in made and value not in known]
    if missing:
        raise VdqError(f"{origin}: nothing makes the output {missing[0]!r}")
    try:
        indices = list(nx.lexicographical_topological_sort(order, key=lambda i: (ops[i].name, ops[i].outputs)))
    except nx.NetworkXUnfeasible as error:
        raise VdqError(f"{origin}: the graph has a cycle") from error
    return tuple(ops[i] for i in indices)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class _Reader:
    origin: str
    folder: Path | None
    root: Path | None
    digests: Digests

    def param(self, tensor: TensorProto, name: str) -> Param:
        kind = TensorType(dtype_name(tensor.data_type), tuple(tensor.dims))
        if tensor.data_location != TensorProto.EXTERNAL:
            data = _inline_bytes(tensor)
            return Param(name, kind, _digest(data), len(data), False, lambda: numpy_helper.to_array(tensor))
        path, offset, length = self._external(tensor, name)

        def read() -> np.ndarray:
            filled = TensorProto(data_type=tensor.data_type, dims=tensor.dims)
            filled.raw_data = b"".join(_chunks(path, offset, length))
            return numpy_helper.to_array(filled)

        key = (path, offset, length)
        if key not in self.digests:
            digest = hashlib.sha256()
            for chunk in _chunks(path, offset, length):
                digest.update(chunk)
            self.digests[key] = digest.hexdigest()
        return Param(name, kind, self.digests[key], length, True, read)

    def _external(self, tensor: TensorProto, name: str) -> tuple[Path, int, int]:
        """File, offset and length of an external tensor, checked to lie inside `root` and inside the file."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self.origin}: external data of {name}"
        if self.folder is None or self.root is None or not entries.get("location"):
            raise VdqError(f"{where}: no file given")
        path = (self.folder / entries["location"]).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise VdqError(f"{where} leaves the folder: {entries['location']}")
        if not path.is_file():
            raise VdqError(f"{where} is missing: {entries['location']}")
        size = path.stat().st_size
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size - offset))
        except ValueError as error:
            raise VdqError(f"{where}: {error}") from error
        if offset < 0 or length < 0 or offset + length > size:
            raise VdqError(f"{where}: bytes {offset} to {offset + length} of a file of {size}", hint="is it truncated?")
        return path, offset, length


def _inline_bytes(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    if tensor.data_type == TensorProto.STRING:
        return b"\0".join(tensor.string_data)
    # the same numbers may also be stored in typed fields; packing them again makes both spellings hash alike
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _chunks(path: Path, offset: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        left = length
        while left:
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise VdqError(f"{path}: ends {left} bytes early", hint="the file is truncated")
            left -= len(chunk)
            yield chunk
