"""The backend's own description of what it compiled (provider option dump_json_qnn_graph), against the graph given.

The dump names an activation after the output of its QuantizeLinear and a constant after its codes; the provider appends
to these names where onnxruntime moved or copied a node ("_token_97", "_out0", "_transpose"). Scales are printed so that
they read back as the same float32. Per-channel quantizers are listed with their number of scales only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from vdq_export.errors import CompileError
from vdq_export.graph import Graph
from vdq_export.graphs.cut import Encoding, encodings
from vdq_export.report.device import Scales

# QNN_DATATYPE_* of QnnTypes.h, as far as graphs here have them
_TYPES = {
    0x0304: "int4", 0x0308: "int8", 0x0316: "int16", 0x0332: "int32",
    0x0404: "uint4", 0x0408: "uint8", 0x0416: "uint16", 0x0432: "uint32",
    0x0216: "float16", 0x0232: "float32",
}  # fmt: skip
_FLOATS = ("float16", "float32")
_INNER = (3, 4)  # QNN_TENSOR_TYPE_NATIVE and _STATIC: neither input nor output of the graph
_SCALE_OFFSET, _AXIS_SCALE_OFFSET, _BITS_AXIS_SCALE_OFFSET = 0, 1, 3  # QNN_QUANTIZATION_ENCODING_*
_UNDEFINED = 0x7FFFFFFF
UNKNOWN = -1  # number of scales, where the dump does not say it
_SUFFIX = re.compile(r"(_token_\d+|_out\d+|_transpose|_reshape)+$")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the backend. scale, zero_point: of a per-tensor quantizer; channels: of one per channel (or UNKNOWN),
    else 0.
    """

    name: str
    dtype: str
    inner: bool
    scale: np.float32 | None = None
    zero_point: int | None = None
    channels: int = 0


class _ScaleOffset(msgspec.Struct):
    scale: float
    offset: int


class _Quantization(msgspec.Struct):
    encoding: int
    scale_offset: _ScaleOffset | None = None


class _Tensor(msgspec.Struct):
    data_type: int
    type: int
    quant_params: _Quantization


class _Graph(msgspec.Struct):
    tensors: dict[str, _Tensor]


class _Dump(msgspec.Struct):
    graph: _Graph


def read(folder: Path) -> list[Tensor]:
    """Every tensor of the graphs dumped into `folder`. Raises CompileError when there is none, or another format."""
    found: list[Tensor] = []
    for path in sorted(folder.glob("*.json")):
        if not path.name.endswith("_tensor_log.json"):
            try:
                dump = msgspec.json.decode(path.read_bytes(), type=_Dump)
            except msgspec.MsgspecError as error:
                raise CompileError(f"{path.name}: not the backend's dump as this version knows it: {error}") from error
            found += [_tensor(name, one) for name, one in dump.graph.tensors.items()]
    if not found:
        raise CompileError("the backend wrote no description of its graph")
    return found


def compare(graph: Graph, tensors: Iterable[Tensor]) -> Scales:
    """The quantizers of `graph` against the backend's `tensors`."""
    listed = list(tensors)
    theirs: dict[str, list[Tensor]] = {}
    for one in listed:
        for name in {one.name, _SUFFIX.sub("", one.name)}:
            theirs.setdefault(name, []).append(one)
    ours = list(encodings(graph))
    matched = {one.codes: theirs[one.codes] for one in ours if one.codes in theirs}
    pairs = [(mine, other) for mine in ours for other in matched.get(mine.codes, ())]
    differences = [_difference(mine, other) for mine, other in pairs]
    known = {(one.dtype, float(one.scale), int(one.zero_point)) for one in ours if one.axis is None}
    named = {id(other) for _, other in pairs}
    foreign = [
        one.name
        for one in listed
        if id(one) not in named and one.scale is not None and (one.dtype, float(one.scale), one.zero_point) not in known
    ]
    return Scales(
        quantizers=len(ours),
        found=len(matched),
        per_channel=sum(one.axis is not None for one in ours if one.codes in matched),
        largest_difference=max((one for one in differences if one is not None), default=0.0),
        mismatches=tuple(dict.fromkeys(mine.codes for mine, other in pairs if not _equal(mine, other))),
        foreign=tuple(foreign),
        float_tensors=tuple(one.name for one in listed if one.inner and one.dtype in _FLOATS),
    )


def _tensor(name: str, one: _Tensor) -> Tensor:
    dtype = _TYPES.get(one.data_type, f"{one.data_type:#06x}")
    given, inner = one.quant_params, one.type in _INNER
    if given.scale_offset is None or given.encoding == _UNDEFINED:
        return Tensor(name, dtype, inner)
    if given.encoding == _SCALE_OFFSET:  # QNN writes x = scale · (q + offset)
        return Tensor(name, dtype, inner, np.float32(given.scale_offset.scale), -given.scale_offset.offset)
    # The dump reads each member of a C union as if it were {float scale, int32 offset}.
    if given.encoding == _AXIS_SCALE_OFFSET:  # {int32 axis, uint32 number of scales, …}
        return Tensor(name, dtype, inner, channels=given.scale_offset.offset)
    bits = dtype
    if given.encoding == _BITS_AXIS_SCALE_OFFSET:  # {uint32 bits, int32 axis, …}: 4-bit codes stand in 8-bit ones
        bits = f"{dtype.rstrip('0123456789')}{int(np.float32(given.scale_offset.scale).view(np.int32))}"
    return Tensor(name, bits, inner, channels=UNKNOWN)


def _difference(mine: Encoding, other: Tensor) -> float | None:
    """Relative difference of two per-tensor scales; None where either has one per channel."""
    if mine.axis is not None or other.scale is None:
        return None
    return abs(float(other.scale) - float(mine.scale)) / float(mine.scale)


def _equal(mine: Encoding, other: Tensor) -> bool:
    if mine.dtype != other.dtype:
        return False
    if mine.axis is not None:
        return other.channels in (mine.scale.size, UNKNOWN)
    return other.scale == mine.scale and other.zero_point == int(mine.zero_point)
