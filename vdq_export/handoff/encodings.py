"""AIMET encodings of a Q/DQ graph: what converters read that want a float graph and its scales in a file beside it.

Legend: a *tensor* is what one encoding names. Of an activation it is the float value that is quantized; of a constant
the output of its DequantizeLinear; of a value quantized a second time (for readers that take another type) the output
of that second DequantizeLinear, which is an Identity in the float graph (float_graph.py). A value that leaves the graph
through Q/DQ takes the output's name.

The three formats say one thing, x̂ = scale · (q − zero_point), in their own terms (AIMET's "Encoding Format
Specification"):

| version | parameters and activations | offset or zero point | per channel | per block |
| 0.6.1 | two dicts of lists, one entry a channel | offset = −zero_point as if the type were unsigned | no axis | none |
| 1.0.0 | two lists | the same | no axis: output channels | output channels × blocks, flattened |
| 2.0.0 | one list | zero_point in the type's own terms, left out when 0 | axis | axis of the blocks, block_size |

So the offset of symmetric int8 is −128 in the older two. They call a tensor symmetric that is signed around zero; a
signed one with another zero point is the same grid in unsigned terms and is written so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import BundleError
from vdq_export.graph import Array, Graph, Node, is_constant

Version = Literal["0.6.1", "1.0.0", "2.0.0"]
VERSIONS: tuple[Version, ...] = get_args(Version)
FOLDER = "handoff/encodings"
LARGE = 1 << 24  # bytes of a 0.6.1 file, six numbers a channel, above which a bundle goes without it
_INTEGERS = ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32")


@dataclass(frozen=True)
class Encoding:
    """One quantizer: q = clip(round(x / scale) + zero_point) in `dtype`.

    scale, zero_point: [] per tensor, [C] along `axis`, or, with `block` numbers of `axis` sharing one, of the tensor's
    rank. parameter: a constant of the graph.
    """

    name: str
    dtype: str
    scale: Array
    zero_point: Array
    axis: int | None = None
    block: int = 0
    parameter: bool = False

    @property
    def bits(self) -> int:
        return int(self.dtype.removeprefix("u").removeprefix("int"))

    @property
    def signed(self) -> bool:
        return not self.dtype.startswith("u")

    @property
    def symmetric(self) -> bool:
        return self.signed and not self.zero_point.any()

    @property
    def offset(self) -> Array:
        """−zero_point of the same grid in the unsigned type."""
        shift = 2 ** (self.bits - 1) if self.signed else 0
        return -(self.zero_point.astype(np.int64) + shift)

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    def same_grid(self, other: Encoding) -> bool:
        mine, theirs = (self.dtype, self.axis, self.block), (other.dtype, other.axis, other.block)
        equal = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)
        return mine == theirs and equal


@dataclass(frozen=True)
class Quantized:
    """A DequantizeLinear and what it stands for.

    dequantized: its output. origin: the float value that was quantized, codes: the integer constant; one of them is "".
    second: it is one more quantizer of a value that has an encoding of its own.
    """

    encoding: Encoding
    dequantized: str
    origin: str = ""
    codes: str = ""
    second: bool = False


def read(graph: Graph) -> list[Quantized]:
    """Every DequantizeLinear of `graph`, in graph order. Raises BundleError for one that no encoding can express."""
    reader = _Reader({v.name for v in graph.gs.inputs}, {v.name for v in graph.gs.outputs})
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and any(one.op != "DequantizeLinear" for one in node.outputs[0].outputs):
            raise BundleError(f"{node.name} is read by an operator that computes in integers: AIMET has no word for it")
        if node.op == "DequantizeLinear":
            reader.add(node)
    return reader.found


class _Reader:
    """Names tensors in graph order: the first pair on a value names it, others are tensors of their own."""

    def __init__(self, inputs: set[str], outputs: set[str]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._first: dict[str, Quantized] = {}  # float value -> its first pair
        self._behind: dict[str, Quantized] = {}  # output of a DequantizeLinear -> the pair
        self.found: list[Quantized] = []

    def add(self, node: Node) -> None:
        made = _constant(node) if is_constant(node.inputs[0]) else _activation(node)
        if made.origin:
            made = self._named(made)
        self._behind[made.dequantized] = made
        self.found.append(made)

    def _named(self, made: Quantized) -> Quantized:
        earlier = self._behind.get(made.origin) or self._first.get(made.origin)
        leaves = made.dequantized in self._outputs
        if earlier is None and not (leaves and made.origin in self._inputs | self._outputs):
            self._first[made.origin] = _renamed(made, made.dequantized) if leaves else made
            return self._first[made.origin]
        if earlier is not None and not leaves and made.encoding.same_grid(earlier.encoding):
            return _renamed(made, earlier.encoding.name)  # the same numbers a second time
        return _renamed(made, made.dequantized, second=True)


def of_graph(graph: Graph) -> list[Encoding]:
    """One encoding a quantized tensor, in graph order."""
    return list({one.encoding.name: one.encoding for one in read(graph)}.values())


def to_json(encodings: Iterable[Encoding], version: Version) -> bytes:
    """The encodings file, one tensor a line. Raises BundleError for what `version` cannot express (0.6.1: blocks)."""
    listed = list(encodings)
    if version == "2.0.0":
        return _lines({"version": version}, {"encodings": [_v2(one) for one in listed]})
    make = _v1 if version == "1.0.0" else _v06
    parts = {
        "activation_encodings": [make(one) for one in listed if not one.parameter],
        "param_encodings": [make(one) for one in listed if one.parameter],
    }
    return _lines({"version": version, "quantizer_args": _arguments(listed)}, parts, keyed=version == "0.6.1")


def from_json(data: bytes) -> list[Encoding]:
    """What a file of ours says. 0.6.1 and 1.0.0 have no axis and flatten blocks: None and [C · blocks] there."""
    held = json.loads(data)
    if held["version"] == "2.0.0":
        return [_from_v2(one) for one in held["encodings"]]
    found = []
    for part, parameter in (("activation_encodings", False), ("param_encodings", True)):
        if held["version"] == "0.6.1":
            found += [_from_v06(name, one, parameter) for name, one in held[part].items()]
        else:
            found += [_from_v1(one, parameter) for one in held[part]]
    return found


def write_encodings(writer: BundleWriter, graphs: Mapping[str, Graph | Path]) -> list[str]:
    """handoff/encodings/NAME.aimet-VERSION.json for each {NAME: its Q/DQ graph}; returns the bundle paths.

    0.6.1 is left out where the graph has block scales, which it cannot express, or a file would take more than 16 MiB;
    the latter `vdq-export encodings` writes nevertheless.
    """
    paths = []
    for name, graph in graphs.items():
        encodings = of_graph(Graph.load(graph) if isinstance(graph, Path) else graph)
        for version in VERSIONS:
            if version == "0.6.1" and any(one.block for one in encodings):
                continue
            data = to_json(encodings, version)
            if version == "0.6.1" and len(data) > LARGE:
                continue
            paths.append(f"{FOLDER}/{file_name(name, version)}")
            writer.add_file(paths[-1], data)
    return paths


def file_name(name: str, version: Version) -> str:
    return f"{name.removeprefix('body.')}.aimet-{version}.json"


def _constant(node: Node) -> Quantized:
    codes = node.inputs[0]
    name = node.outputs[0].name
    return Quantized(_encoding(node, name, str(codes.dtype), codes.shape, parameter=True), name, codes=codes.name)


def _activation(node: Node) -> Quantized:
    producer = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if producer is None or producer.op != "QuantizeLinear":
        raise BundleError(
            f"{node.name} dequantizes what no QuantizeLinear made: AIMET has no word for it",
            hint="encodings are for targets that quantize with plain Q/DQ pairs (qnn)",
        )
    value, dequantized = producer.inputs[0], node.outputs[0].name
    dtype = str(node.inputs[2].dtype) if len(node.inputs) > 2 else str(node.inputs[0].dtype)
    made, own = (_encoding(n, value.name, dtype, value.shape, parameter=is_constant(value)) for n in (node, producer))
    if not made.same_grid(own):
        raise BundleError(f"{producer.name} and {node.name} differ in scale or zero point")
    return Quantized(made, dequantized, origin=value.name)


def _encoding(node: Node, name: str, dtype: str, shape: Any, *, parameter: bool) -> Encoding:
    if dtype not in _INTEGERS:
        raise BundleError(f"{node.name}: AIMET's encodings have no {dtype}", hint=f"they have {', '.join(_INTEGERS)}")
    if not all(is_constant(one) for one in node.inputs[1:]):
        raise BundleError(f"{node.name}: its scale is computed at run time, which no encoding can express")
    scale = np.asarray(node.inputs[1].values)
    zero = np.asarray(node.inputs[2].values, np.int64) if len(node.inputs) > 2 else np.zeros(scale.shape, np.int64)
    block = int(node.attrs.get("block_size", 0))
    if scale.size == 1 and not block:
        return Encoding(name, dtype, scale.reshape(()), zero.reshape(()), parameter=parameter)
    axis = int(node.attrs.get("axis", 1)) % len(shape)
    return Encoding(name, dtype, scale, zero, axis, block, parameter)


def _renamed(one: Quantized, name: str, *, second: bool = False) -> Quantized:
    e = one.encoding
    named = Encoding(name, e.dtype, e.scale, e.zero_point, e.axis, e.block, e.parameter)
    return Quantized(named, one.dequantized, one.origin, one.codes, second)


def _flat(one: Encoding, values: Array) -> list[Any]:
    """One number a channel; of blocks [K / block, N] output channels first, as 1.0.0 has them."""
    ordered = values.T if one.block and one.axis == 0 else values
    listed: list[Any] = ordered.reshape(-1).tolist()
    return listed


def _v06(one: Encoding) -> tuple[str, list[dict[str, Any]]]:
    if one.block:
        raise BundleError(f"{one.name}: version 0.6.1 has no block scales", hint="use 1.0.0 or 2.0.0")
    scales = one.scale.astype(np.float64).reshape(-1)
    rows = zip(scales, one.zero_point.reshape(-1), one.offset.reshape(-1), strict=True)
    return one.name, [
        {
            "bitwidth": one.bits,
            "dtype": "int",
            "is_symmetric": str(one.symmetric),
            "min": float((one.lowest - int(zero)) * scale),
            "max": float((one.lowest + 2**one.bits - 1 - int(zero)) * scale),
            "offset": int(offset),
            "scale": float(scale),
        }
        for scale, zero, offset in rows
    ]


def _v1(one: Encoding) -> dict[str, Any]:
    kind = "PER_BLOCK" if one.block else "PER_TENSOR" if one.axis is None else "PER_CHANNEL"
    return {
        "name": one.name,
        "enc_type": kind,
        "dtype": "INT",
        "bw": one.bits,
        "is_sym": one.symmetric,
        **({"block_size": one.block} if one.block else {}),
        "scale": _flat(one, one.scale.astype(np.float64)),
        "offset": _flat(one, one.offset),
    }


def _v2(one: Encoding) -> dict[str, Any]:
    return {
        "name": one.name,
        "output_dtype": one.dtype,
        "y_scale": one.scale.astype(np.float64).tolist(),
        **({"y_zero_point": one.zero_point.tolist()} if one.zero_point.any() else {}),
        **({} if one.axis is None else {"axis": one.axis}),
        **({"block_size": one.block} if one.block else {}),
    }


def _arguments(encodings: list[Encoding]) -> dict[str, Any]:
    """What the older formats say about a whole file: the commonest widths, for readers that want the keys."""
    widths = [Counter(one.bits for one in encodings if one.parameter is kind) for kind in (False, True)]
    activation, parameter = (count.most_common(1)[0][0] if count else 8 for count in widths)
    return {
        "activation_bitwidth": activation,
        "dtype": "int",
        "is_symmetric": True,
        "param_bitwidth": parameter,
        "per_channel_quantization": any(one.axis is not None for one in encodings),
        "quant_scheme": "post_training_tf",
    }


def _from_v06(name: str, rows: list[dict[str, Any]], parameter: bool) -> Encoding:
    one = {"bw": rows[0]["bitwidth"], "is_sym": rows[0]["is_symmetric"] == "True", "name": name}
    one |= {"enc_type": "PER_TENSOR" if len(rows) == 1 else "PER_CHANNEL"}
    return _from_v1(one | {key: [row[key] for row in rows] for key in ("scale", "offset")}, parameter)


def _from_v1(one: dict[str, Any], parameter: bool) -> Encoding:
    dtype = f"int{one['bw']}" if one["is_sym"] else f"uint{one['bw']}"
    shape = () if one["enc_type"] == "PER_TENSOR" else (len(one["scale"]),)
    shift = 2 ** (one["bw"] - 1) if one["is_sym"] else 0
    zero = -np.array(one["offset"], np.int64) - shift
    scale = np.array(one["scale"], np.float32)
    block = one.get("block_size", 0)
    return Encoding(one["name"], dtype, scale.reshape(shape), zero.reshape(shape), block=block, parameter=parameter)


def _from_v2(one: dict[str, Any]) -> Encoding:
    scale = np.array(one["y_scale"], np.float32)
    zero = np.array(one.get("y_zero_point", np.zeros(scale.shape)), np.int64)
    return Encoding(one["name"], one["output_dtype"], scale, zero, one.get("axis"), one.get("block_size", 0))


def _lines(head: dict[str, Any], parts: Mapping[str, list[Any]], *, keyed: bool = False) -> bytes:
    """Compact JSON, one tensor a line: two bins' files can be compared line by line."""
    pieces = [f"{json.dumps(key)}:{_dump(value)}" for key, value in head.items()]
    for key, items in parts.items():
        rows = ",\n".join(_rows(items, keyed))
        opening, closing = ("{", "}") if keyed else ("[", "]")
        pieces.append(f"{json.dumps(key)}:{opening}\n{rows}\n{closing}")
    return ("{" + ",\n".join(pieces) + "}\n").encode()


def _rows(items: list[Any], keyed: bool) -> Iterator[str]:
    for item in items:
        if keyed:
            name, value = cast(tuple[str, Any], item)
            yield f"{json.dumps(name)}:{_dump(value)}"
        else:
            yield _dump(item)


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
