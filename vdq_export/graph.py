"""The ONNX graph as passes see it; with promise.py the only file that imports onnx_graphsurgeon.

Names: a node is "<module path>/<Op>", its first output carries the node's name, an initializer its parameter's path.
A *linear* is, after the canonical passes, MatMul(x[..., K], W[K, N]) with an optional Add(bias[N]) behind it.

Weights stay where they are: a Constant holds a numpy array that may be a view of a torch parameter or of a mapped file,
or a Promise to compute one. `skeleton()` gives the graph without them (external-data placeholders) and beside it the
arrays, one at a time, so that nothing between trace and bundle ever copies the model. A graph traced without weights
has their names, shapes and types only; bind() gives them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from vdq_export import onnx_file
from vdq_export.errors import PassError
from vdq_export.weights.external_data import FOUR_BIT, map_external, of_foreign_types, placeholder
from vdq_export.weights.promise import Array, Arrays, Lazy, Promise, Unbound, ahead, bound, read, release, unbound

__all__ = ["Array", "Arrays", "Constant", "Graph", "Linear", "Node", "Unbound", "Value", "Variable", "release"]
OUTPUT = "sample"  # the name of a network's only output in every graph that is traced
INLINE_BYTES = 1024  # smaller constants stay inside the .onnx file
# graphsurgeon is untyped; these names say which of its objects is meant.
Node: TypeAlias = Any
Variable: TypeAlias = Any
Constant: TypeAlias = Any
Value: TypeAlias = Any
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR  # it warns of every float8 value, which is preserved


@dataclass(frozen=True)
class Linear:
    """One linear: y[..., N] = value[..., K] · weight[K, N] (+ bias[N])."""

    name: str  # module path
    matmul: Node
    add: Node | None
    value: Variable
    weight: Constant
    bias: Constant | None

    @property
    def output(self) -> Variable:
        """What others read, the bias added: [..., N]."""
        return (self.add or self.matmul).outputs[0]

    def read_weight(self) -> Array:
        """The weight's values, not kept by the graph where they are a promise (see transform_lazily)."""
        return read(self.weight._values)

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)"""
        rows, columns = self.weight.shape
        return int(rows), int(columns)

    @property
    def rows(self) -> int:
        """Tokens times batch: the product of the leading dimensions of `value`."""
        return prod(self.value.shape[:-1])


class Graph:
    """A static-shape ONNX graph. `source` is the hash of the model's weights and signature it was traced from.

    bare: the module it was traced from answers with a tensor, and not with something that holds one.
    """

    def __init__(self, graph: gs.Graph, source: str = "", bare: bool = False) -> None:
        self.gs = graph
        self.source = source
        self.bare = bare
        self._taken: set[str] | None = None  # names in use or promised by fresh(); None: not collected yet

    @staticmethod
    def from_proto(proto: onnx.ModelProto, arrays: Mapping[str, Any] | None = None, source: str = "") -> Graph:
        """`arrays` supplies initializers whose data the proto leaves out: an Array or an Unbound each."""
        graph = gs.import_onnx(proto)
        given = arrays.held if isinstance(arrays, Arrays) else dict(arrays or {})
        held = of_foreign_types(proto) | given
        for name, tensor in graph.tensors().items():
            if name in held and isinstance(tensor, gs.Constant):
                tensor.values, tensor.data_location = held[name], None
        return Graph(graph, source)

    @staticmethod
    def load(path: Path) -> Graph:
        """Read an .onnx file; external data is mapped, not read. Raises ModelError for what is no such file."""
        proto = onnx_file.read(path)
        arrays = {}
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                arrays[tensor.name] = map_external(tensor, path.parent)
        return Graph.from_proto(proto, arrays)

    def skeleton(self) -> tuple[onnx.ModelProto, Arrays]:
        """(proto with every large constant as an external-data placeholder, {name: array} of those constants).

        Constants without values are placeholders too, and missing in the arrays.
        """
        self.check()
        held: dict[str, Any] = {}
        swapped = []
        for tensor in list(self.constants()):
            values = tensor._values
            if isinstance(values, Lazy) and not isinstance(values, Promise | Unbound):
                values = tensor.values  # of a file: graphsurgeon's own, whose bytes are in memory anyway
            # 4-bit constants go the same way whatever their size: graphsurgeon does not pack them.
            large = values.nbytes >= INLINE_BYTES or np.dtype(values.dtype).name in FOUR_BIT
            if large and not unbound(values):
                held[tensor.name] = values
            if large or unbound(values):
                swapped.append((tensor, values, Lazy(placeholder(tensor.name, values))))
            elif isinstance(values, Promise):
                swapped.append((tensor, values, read(values)))
        try:
            for tensor, _, instead in swapped:
                tensor.values = instead
            proto = gs.export_onnx(self.gs)
        finally:
            for tensor, values, _ in swapped:
                tensor.values = values
        return proto, Arrays(held)

    def to_proto(self) -> onnx.ModelProto:
        """The whole model in one proto; for small graphs (2 GB is protobuf's limit)."""
        proto, arrays = self.skeleton()
        for tensor in proto.graph.initializer:
            if tensor.name in arrays:
                full = onnx.numpy_helper.from_array(np.ascontiguousarray(arrays[tensor.name]), tensor.name)
                tensor.CopyFrom(full)
        return proto

    def save(self, path: Path) -> None:
        """One .onnx file with its constants inside up to 1 GiB, beside it in `<name>.data` above."""
        large = sum(t._values.nbytes for t in self.constants()) > 2**30
        onnx.save_model(self.to_proto(), path, save_as_external_data=large, location=path.name + ".data")

    def copy(self) -> Graph:
        """Independent nodes and values, shared weight arrays."""
        duplicate = Graph(self.gs.copy(), self.source, self.bare)
        duplicate.gs.producer_name = self.gs.producer_name
        duplicate.gs.producer_version = self.gs.producer_version
        if self.gs.import_domains is not None:  # shared, and exporting one graph appends its domains to all of them
            duplicate.gs.import_domains = list(self.gs.import_domains)
        return duplicate

    def hash(self) -> str:
        """sha256 over structure and every constant; not over who wrote it: a record outlives an upgrade of torch.

        Weights of a checkpoint that was hashed go by their tensor's digest, and are not read again.
        """
        proto, arrays = self.skeleton()
        proto.ClearField("producer_name")
        proto.ClearField("producer_version")
        digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
        held = [arrays.held[name] for name in sorted(arrays)]
        for values in held:
            if isinstance(values, Promise) and values.identity is not None:
                digest.update(values.identity)
        for array in ahead(x for x in held if not isinstance(x, Promise) or x.identity is None):
            # Transposed: linears' weights, the bulk, are views of output-channel-major storage and need no copy so.
            digest.update(np.ascontiguousarray(array.T).view(np.uint8).data)
            release(array)
        return digest.hexdigest()

    def check(self) -> None:
        """Raise PassError when two values share a name: exported, they would silently become one."""
        seen: dict[str, Value] = {}
        for node in self.gs.nodes:
            for tensor in [*node.inputs, *node.outputs]:
                if tensor.name and seen.setdefault(tensor.name, tensor) is not tensor:
                    raise PassError(f"two values named {tensor.name!r} (one at node {node.name})")

    def cleanup(self) -> None:
        """Drop what no output needs; order each node right before its first reader's turn, else as it stood."""
        self.gs.cleanup(remove_unused_node_outputs=False)
        ordered: list[Node] = []
        done: set[int] = set()
        for root in list(self.gs.nodes):
            stack = [root]
            while stack:
                node = stack[-1]
                waiting = [m for t in node.inputs for m in t.inputs if id(m) not in done]
                if id(node) in done or not waiting:
                    if id(node) not in done:
                        done.add(id(node))
                        ordered.append(node)
                    stack.pop()
                else:
                    stack.extend(reversed(waiting))
        self.gs.nodes.clear()
        self.gs.nodes.extend(ordered)
        self._taken = None  # what was dropped frees its name: a second run of a pass then writes the same bytes

    # -- reading -------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """All of them, in the order in which they run; a list of its own."""
        return list(self.gs.nodes)

    def constants(self) -> Iterator[Constant]:
        """Those that a node reads, promised ones too."""
        for tensor in self.gs.tensors().values():
            if isinstance(tensor, gs.Constant):
                yield tensor

    def values(self) -> dict[str, Value]:
        """Inputs, outputs, constants and everything between, by name."""
        found: dict[str, Value] = self.gs.tensors()
        return found

    def linears(self) -> list[Linear]:
        """Every linear, in graph order."""
        return [found for node in self.gs.nodes if (found := as_linear(node)) is not None]

    def attention_matmuls(self) -> list[Node]:
        """MatMuls of two computed operands (QKᵀ and PV), in graph order."""
        return [n for n in self.gs.nodes if n.op == "MatMul" and not any(isinstance(t, gs.Constant) for t in n.inputs)]

    # -- editing -------------------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """`name`, or the first of name_1, name_2 … that no value or node carries and no earlier call returned."""
        if self._taken is None:
            self._taken = self.gs.tensors().keys() | {n.name for n in self.gs.nodes}
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def constant(self, name: str, values: Array) -> Constant:
        """A new constant; `name` must be free (use fresh() where repeats are expected)."""
        self._take(name)
        return gs.Constant(name, np.asarray(values))

    def derived(
        self,
        name: str,
        source: Constant | Array,
        change: Callable[[Array], Array],
        shape: Sequence[int] | None = None,
        dtype: Any = None,
    ) -> Constant:
        """A new constant change(source), held as a promise; shape, dtype: if they are not those of `source`."""
        self._take(name)
        return gs.Constant(name, Promise(_held(source), change, shape, dtype))

    def add_node(
        self,
        op: str,
        inputs: Sequence[Value],
        name: str,
        *,
        dtype: Any,
        shape: Sequence[int] | None,
        attrs: Mapping[str, Any] | None = None,
        domain: str | None = None,
        more: Sequence[tuple[str, Any, Sequence[int]]] = (),
    ) -> Variable:
        """Append a node whose first output carries the node's name; returns it. Call cleanup() afterwards.

        more: further outputs, each what is appended to the name, type and shape.
        """
        self._take(name)
        outputs = [gs.Variable(name, dtype=dtype, shape=None if shape is None else list(shape))]
        outputs += [gs.Variable(self.fresh(name + end), dtype=kind, shape=list(sizes)) for end, kind, sizes in more]
        self.gs.nodes.append(gs.Node(op, name, dict(attrs or {}), list(inputs), outputs, domain=domain))
        return outputs[0]

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> Variable:
        """A new input, the last; `name` must be free."""
        self._take(name)
        made = gs.Variable(name, dtype=dtype, shape=list(shape))
        self.gs.inputs = [*self.gs.inputs, made]
        return made

    def define(self, function: onnx.FunctionProto) -> None:
        """Take a model-local function in, once: nodes of its domain and name then have a body."""
        if all((known.domain, known.name) != (function.domain, function.name) for known in self.gs.functions):
            self.gs.functions.append(gs.importers.onnx_importer.OnnxImporter.import_function(function))

    def _take(self, name: str) -> None:
        if self._taken is not None:
            self._taken.add(name)

    def replace_uses(self, old: Value, new: Value, keep: Sequence[Node] = ()) -> None:
        """Let every reader of `old` except the nodes in `keep` read `new`; graph outputs too (they keep their name)."""
        for node in list(old.outputs):
            if not any(node is kept for kept in keep):
                for index, tensor in enumerate(node.inputs):
                    if tensor is old:
                        node.inputs[index] = new
        for index, tensor in enumerate(self.gs.outputs):
            if tensor is old:
                old.name, new.name = self.fresh(f"{old.name}/replaced"), old.name
                self.gs.outputs[index] = new


def as_linear(node: Node) -> Linear | None:
    """The linear whose MatMul is `node`, or None. Its weight has rank 2; a rotation's matrix [1, b, b] is no weight."""
    if node.op != "MatMul" or not isinstance(node.inputs[1], gs.Constant) or isinstance(node.inputs[0], gs.Constant):
        return None
    value, weight = node.inputs
    if len(weight.shape) != 2:
        return None
    add, bias = None, None
    readers = list(node.outputs[0].outputs)
    if len(readers) == 1 and readers[0].op == "Add":
        others = [t for t in readers[0].inputs if t is not node.outputs[0]]
        if len(others) == 1 and isinstance(others[0], gs.Constant) and tuple(others[0].shape) == (weight.shape[1],):
            add, bias = readers[0], others[0]
    return Linear(node.name.rsplit("/", 1)[0], node, add, value, weight, bias)


def absent() -> Variable:
    """What stands for an optional operand or result that a node does not have."""
    return gs.Variable.empty()


def is_constant(tensor: Value) -> bool:
    """Whether it is a constant of the graph, be its values promised."""
    return isinstance(tensor, gs.Constant)


def is_promise(tensor: Constant) -> bool:
    """Whether the values are computed, or supplied, later."""
    return isinstance(tensor._values, Promise | Unbound)


def is_unbound(tensor: Constant) -> bool:
    """Whether bind() has still to supply what the values are made of."""
    return unbound(tensor._values)


def bind(graph: Graph, tensors: Mapping[str, Array], *, source: str = "") -> None:
    """Give a graph traced without weights its weights, in place: {parameter path: array of the parameter's shape}.

    Arrays are not copied; those of another float type, as of a bfloat16 checkpoint, are converted each time they are
    read. source: what Graph.source becomes. Copies of the graph stay as they were: experts share one trace.
    Raises ModelError for a parameter that is missing or has another shape; the graph is then as it was.
    """
    found = {id(c): (c, bound(c._values, tensors)) for c in graph.constants() if is_unbound(c)}
    for constant, values in found.values():
        constant.values = values
    graph.source = source or graph.source


def _held(source: Constant | Array) -> Any:
    return source if isinstance(source, np.ndarray) else source._values


def transform_lazily(weight: Constant, change: Callable[[Array], Array]) -> None:
    """change(weight), held as a promise: passes that follow read one weight at a time.

    Smoothing and rotation touch every weight before any is quantized; done at once, that would double the model in
    memory.
    """
    weight.values = Promise(weight._values, change)


def multiply_lazily(weight: Constant, factor: Array) -> None:
    """weight · factor (broadcast), held as a promise."""
    transform_lazily(weight, lambda values: values * factor.astype(values.dtype))
