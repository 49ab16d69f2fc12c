"""A float graph as a chain of segments, so that one with more weights than memory can be run a segment at a time.

Segments follow the graph's order. What later segments read from earlier ones *crosses*; each segment's weights stay
below a budget and the crossing values are few: of all such chains the one with the least bytes at its cuts.

Every operator runs as it stands, none fused with its neighbours: how a graph is cut then changes no bit of what it
computes. Measured on the sample that costs 5 to 14 % of the time of an optimised session.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch

from vdq_export import ort
from vdq_export.errors import CalibrationError, ModelError, PassError
from vdq_export.graph import Array, Graph, Node, Value, is_constant

BUDGET = 2**30
"""Bytes of float weights a segment may hold. A session has them once (they are handed over, not copied), converted from
the checkpoint's type as they are read; a block of a 14 B transformer has 1.4 GB, one of a 1.3 B 0.19 GB. Smaller
segments save little beside a block's activations and cross more often."""
CPU = "CPUExecutionProvider"
ALIGNMENT = 64
_UNKNOWN = 2**50  # bytes of a value whose size is not known: more than any, and thousands of them fit into 64 bits


class Store(Protocol):
    """Where results are kept from run to run, as work_store.WorkStore does."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, data: bytes) -> Any: ...


@dataclass(frozen=True)
class Segment:
    """Nodes start … stop − 1 of the graph. weights: bytes of float constants they read.

    inputs: graph inputs and values of earlier segments; outputs: what later segments read, and graph outputs; shown:
    values asked for besides.
    """

    number: int
    start: int
    stop: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shown: tuple[str, ...]
    weights: int


def weight_bytes(graph: Graph) -> int:
    """Bytes of the constants of `graph` in the types it computes with; none is read."""
    return sum(int(one._values.nbytes) for one in graph.constants())


def split(graph: Graph, budget: int = BUDGET, shown: Mapping[str, int] | None = None, limit: int = 0) -> list[Segment]:
    """The segments of `graph`, whose nodes are in an order in which they can be run.

    shown: inner values that segments shall return, with their bytes; a segment returns at most `limit` bytes of them
    (0: any number). A single node may exceed both limits. Raises PassError where no value of known type and shape
    could be cut.
    """
    nodes, shown = graph.nodes, shown or {}
    heavy = list(accumulate((_weights(node) for node in nodes), initial=0))
    seen = list(accumulate((sum(shown.get(v.name, 0) for v in node.outputs) for node in nodes), initial=0))
    crossing = _crossing(graph, nodes)
    cuts = _cheapest(heavy, seen if limit else [0] * len(seen), crossing, budget, limit or 1)
    return [_segment(graph, nodes, number, *ends, shown, heavy) for number, ends in enumerate(cuts)]


def _weights(node: Node) -> int:
    return sum({one.name: int(one._values.nbytes) for one in node.inputs if is_constant(one)}.values())


def _crossing(graph: Graph, nodes: Sequence[Node]) -> list[float]:
    """Bytes of inner values that are made before node i and read from it on; infinite where one's type is not known."""
    place = {id(node): index for index, node in enumerate(nodes)}
    steps = np.zeros(len(nodes) + 1, np.int64)
    for index, node in enumerate(nodes):
        for value in node.outputs:
            last = max((place[id(reader)] for reader in value.outputs), default=index)
            if last > index:
                steps[index + 1] += (size := _bytes(value))
                steps[last + 1] -= size
    return [float(total) if total < _UNKNOWN else np.inf for total in np.cumsum(steps)[:-1]]


def _bytes(value: Value) -> int:
    known = value.dtype is not None and value.shape is not None and all(isinstance(d, int) for d in value.shape)
    return prod(value.shape) * np.dtype(value.dtype).itemsize if known else _UNKNOWN


def _cheapest(
    heavy: Sequence[int], seen: Sequence[int], crossing: Sequence[float], budget: int, limit: int
) -> list[tuple[int, int]]:
    """(start, stop) of the segments whose cuts cost least, fewest segments among equals. Dynamic programming:

    best[j] = crossing[j] + min best[i] over the i from which a segment i … j − 1 is within the limits (or i = j − 1).
    The i that are allowed only move up with j, so the least of them is at the front of a queue of rising costs.
    """
    count = len(heavy) - 1
    if count < 1:
        raise PassError("a graph without nodes has no segments")
    best: list[tuple[float, int]] = [(0.0, 0)]
    came_from, queue, low = [0], deque([0]), 0
    for j in range(1, count + 1):
        while low < j - 1 and (heavy[j] - heavy[low] > budget or seen[j] - seen[low] > limit):
            low += 1
        while queue[0] < low:
            queue.popleft()
        cost, segments = best[queue[0]]
        came_from.append(queue[0])
        best.append((cost + (crossing[j] if j < count else 0.0), segments + 1))
        while queue and best[queue[-1]] >= best[j]:
            queue.pop()
        queue.append(j)
    if not np.isfinite(best[count][0]):
        raise PassError("the graph cannot be cut within the budget: types or shapes of inner values are not known")
    found, stop = list[tuple[int, int]](), count
    while stop:
        found.append((came_from[stop], stop))
        stop = came_from[stop]
    return found[::-1]


def _segment(
    graph: Graph,
    nodes: Sequence[Node],
    number: int,
    start: int,
    stop: int,
    shown: Mapping[str, int],
    heavy: Sequence[int],
) -> Segment:
    inside = nodes[start:stop]
    members = {id(node) for node in inside}
    finals = {id(value) for value in graph.gs.outputs}
    read, given = dict[str, None](), dict[str, None]()
    for node in inside:
        for value in node.inputs:
            if value.name and not is_constant(value) and not any(id(maker) in members for maker in value.inputs):
                read[value.name] = None
        for value in node.outputs:
            if id(value) in finals or any(id(reader) not in members for reader in value.outputs):
                given[value.name] = None
    made = [value.name for node in inside for value in node.outputs]
    wanted = tuple(name for name in made if name in shown and name not in given)
    return Segment(number, start, stop, tuple(read), tuple(given), wanted, heavy[stop] - heavy[start])


def extract(graph: Graph, segment: Segment) -> Graph:
    """The segment as a graph of its own; its constants are those of `graph`, promises still unread."""
    part = graph.copy()
    values = part.values()
    nodes = part.nodes
    inside = nodes[segment.start : segment.stop]
    for node in (*nodes[: segment.start], *nodes[segment.stop :]):
        node.inputs.clear()
        node.outputs.clear()
    part.gs.nodes.clear()
    part.gs.nodes.extend(inside)
    part.gs.inputs = [values[name] for name in segment.inputs]
    part.gs.outputs = [values[name] for name in (*segment.outputs, *segment.shown)]
    part.gs.name = f"segment {segment.number} of {graph.gs.name}"
    return part


class Running:
    """A session of one segment; its weights are in memory while it is open."""

    def __init__(self, part: Graph, *, threads: int | None = None, provider: str = CPU) -> None:
        """Raises CalibrationError when onnxruntime cannot run the segment."""
        try:
            options = {"session.disable_prepacking": "1"}  # or every weight is in memory twice
            self._session: Any = ort.session(part, threads=threads, options=options, exact=True, provider=provider)
        except (CalibrationError, PassError):
            raise
        except Exception as error:  # onnxruntime raises classes of its own, without a common public base
            raise CalibrationError(f"onnxruntime cannot run {part.gs.name}: {error}") from error
        self.types = {one.name: str(one.type) for one in self._session.get_inputs()}
        self.outputs = [str(one.name) for one in self._session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: aligned(feeds[name]) for name in self.types}
        return dict(zip(self.outputs, self._session.run(self.outputs, given), strict=True))


class SegmentedNetwork:
    """A graph as a callable with the network's inputs by name, for networks that do not fit in memory.

    Every call reads all weights, one segment's at a time; a graph of one segment stays open. With a `store` a call that
    was made before is answered from it. Returns the graph's first output.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        budget: int = BUDGET,
        store: Store | None = None,
        threads: int | None = None,
        provider: str = CPU,
    ) -> None:
        self._store = store
        self._settings: dict[str, Any] = {"threads": threads, "provider": check_provider(provider)}
        self.segments = split(graph, budget)
        self._parts = [extract(graph, one) for one in self.segments]  # their weights are read by a call, from copies
        self._inputs = [str(one.name) for one in graph.gs.inputs]
        self._output = str(graph.gs.outputs[0].name)
        self._last_read = {name: one.number for one in self.segments for name in one.inputs}
        self._only: Running | None = None
        self._identity = f"{graph.hash()}|{provider}" if store is not None else ""

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Raises ModelError for an input that is missing."""
        if missing := [name for name in self._inputs if not isinstance(inputs.get(name), torch.Tensor)]:
            raise ModelError(f"the network is called without {', '.join(missing)}", hint="give every input as a tensor")
        given = {name: inputs[name] for name in self._inputs}
        key = self._key(given)
        if self._store is not None and (known := self._store.get(key)) is not None:
            return torch.from_numpy(unpack(known).copy())
        output = self._run(given)
        if self._store is not None:
            self._store.put(key, pack(output))
        return torch.from_numpy(output)

    def _run(self, given: Mapping[str, torch.Tensor]) -> Array:
        held: dict[str, Any] = dict(given)
        for segment in self.segments:
            running = self._only or Running(self._parts[segment.number].copy(), **self._settings)
            feeds = {
                name: feed(held[name], kind) if isinstance(held[name], torch.Tensor) else held[name]
                for name, kind in running.types.items()
            }
            held |= running(feeds)
            if len(self.segments) == 1:
                self._only = running
            del running, feeds
            held = {
                name: value
                for name, value in held.items()
                if name == self._output or self._last_read.get(name, -1) > segment.number
            }
        found: Array = held[self._output]
        return found

    def _key(self, given: Mapping[str, torch.Tensor]) -> str:
        digest = hashlib.sha256(self._identity.encode())
        for name, tensor in given.items():
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"|{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
            digest.update(plain.view(torch.uint8).numpy().data if plain.ndim else str(plain.item()).encode())
        return digest.hexdigest()


def feed(tensor: torch.Tensor, ort_type: str) -> Array:
    """A tensor as onnxruntime wants an input of its type, such as "tensor(float)"."""
    name = ort_type.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    plain = tensor.detach().cpu()
    # numpy knows no bfloat16
    known = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
    return aligned(np.ascontiguousarray(known, dtype=dtype))


def aligned(array: Array) -> Array:
    """`array`, or a copy where it begins at no multiple of 64 bytes, as all that onnxruntime itself allocates does.

    Kernels that add numbers up take the first ones by themselves until they reach such a place: the last bits of a sum
    depend on it.
    """
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def check_provider(name: str) -> str:
    """The onnxruntime provider `name`, where it is installed. Raises CalibrationError."""
    if name not in (offered := onnxruntime.get_available_providers()):
        hint = "pip install onnxruntime-gpu" if name == "CUDAExecutionProvider" else "leave it out to use the CPU"
        raise CalibrationError(f"onnxruntime has no {name} here: it offers {', '.join(offered)}", hint=hint)
    return name


def pack(array: Array) -> bytes:
    """An array as bytes: type, shape, data."""
    head = f"{array.dtype.str} {','.join(map(str, array.shape))}\n".encode()
    return head + np.ascontiguousarray(array).tobytes()


def unpack(data: bytes) -> Array:
    """What pack() made; a view of `data`."""
    end = data.index(b"\n")
    kind, _, shape = data[:end].decode().partition(" ")
    sizes = tuple(int(one) for one in shape.split(",") if one)
    return np.frombuffer(data, np.dtype(kind), prod(sizes), end + 1).reshape(sizes)
