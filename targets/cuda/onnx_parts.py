"""An ONNX file as lowering reads it: nodes, ports, and constants whose bytes are mapped where they lie.

A constant's key says which bytes it is (a place in a file, or their hash), so that programs of one folder find what
another one has put on the device already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from vdq_export.errors import CompileError, ModelError
from vdq_export.targets.cuda.torch_quant import TYPES

FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4)
_DEFAULT = ("", "ai.onnx")


@dataclass(frozen=True)
class Op:
    """One node. type: the operator, behind its domain where that is not ONNX's: "MatMul", "vdq.cuda.Linear"."""

    type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Port:
    """An input or an output of a program."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Constant:
    """type: ONNX's. read(device): the values there, 4 bits unpacked to 8; on the CPU they may lie in a mapped file.
    tensor: the same on the CPU, kept; for small ones."""

    type: int
    shape: tuple[int, ...]
    key: tuple[Any, ...]
    read: Callable[[torch.device | str], Tensor] = field(repr=False)

    @property
    def is_float(self) -> bool:
        return self.type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

    @cached_property
    def tensor(self) -> Tensor:
        return self.read("cpu")


class Parts:
    """The parts of `proto`, whose external data lies in `folder`. where: the file, for messages."""

    def __init__(self, proto: onnx.ModelProto, folder: Path | None, where: str) -> None:
        self.where, self._folder = where, folder
        self._files: dict[str, np.ndarray[Any, Any]] = {}
        graph = proto.graph
        self.constants = {one.name: self.constant(one) for one in graph.initializer}
        self.inputs = [_port(one, where) for one in graph.input if one.name not in self.constants]
        self.outputs = [_port(one, where) for one in graph.output]
        self.ops = [self._op(node, at) for at, node in enumerate(graph.node)]
        described = [*graph.value_info, *graph.input, *graph.output]
        self.shapes = {one.name: shape for one in described if (shape := _shape(one)) is not None}
        self.shapes |= {name: constant.shape for name, constant in self.constants.items()}

    def _op(self, node: onnx.NodeProto, at: int) -> Op:
        kind = node.op_type if node.domain in _DEFAULT else f"{node.domain}.{node.op_type}"
        name = node.name or f"node {at}"
        attributes = {one.name: self._attribute(one, name) for one in node.attribute}
        return Op(kind, name, tuple(node.input), tuple(node.output), attributes)

    def _attribute(self, attribute: onnx.AttributeProto, node: str) -> Any:
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
            raise CompileError(f"{self.where}: node {node} holds a graph", hint="static graphs have no branches")
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, TensorProto):
            return self.constant(value)
        return tuple(value) if isinstance(value, list) else value

    def constant(self, proto: TensorProto) -> Constant:
        """Raises CompileError for a type that torch does not have."""
        if proto.data_type not in TYPES:
            raise CompileError(f"{self.where}: {proto.name} is of type {TensorProto.DataType.Name(proto.data_type)}")
        shape, kind = tuple(proto.dims), int(proto.data_type)
        if proto.data_location == TensorProto.EXTERNAL:
            entries = {one.key: one.value for one in proto.external_data}
            if self._folder is None:
                raise ModelError(f"{self.where}: the data of {proto.name} lies outside", hint="say folder=")
            file = self._folder / entries["location"]
            offset = int(entries.get("offset", 0))

            def read(device: torch.device | str) -> Tensor:
                return _viewed(self._mapped(file, offset, kind, shape).to(device), kind, shape)

            return Constant(kind, shape, (str(file.resolve()), offset, kind, shape), read)
        digest = hashlib.sha256(proto.raw_data or proto.SerializeToString(deterministic=True)).hexdigest()
        return Constant(kind, shape, (digest, kind, shape), lambda device: _inline(proto).to(device))

    def _mapped(self, file: Path, offset: int, kind: int, shape: tuple[int, ...]) -> Tensor:
        """Bytes of the file; its pages are copied when written to, which nobody does: torch warns of what cannot be."""
        if str(file) not in self._files:
            try:
                self._files[str(file)] = np.memmap(file, np.uint8, "c")
            except OSError as error:
                raise ModelError(f"{self.where}: cannot read {file}: {error}") from error
        count = int(np.prod(shape, dtype=np.int64))
        size = -(-count // 2) if kind in FOUR_BITS else count * TYPES[kind].dtype.itemsize
        found = self._files[str(file)][offset : offset + size]
        if found.size < size:
            raise ModelError(f"{self.where}: {file} ends before byte {offset + size}")
        return torch.from_numpy(found)


def _viewed(data: Tensor, kind: int, shape: tuple[int, ...]) -> Tensor:
    """Bytes as a tensor of an ONNX type."""
    if kind not in FOUR_BITS:
        return data.view(TYPES[kind].dtype).reshape(shape) if data.numel() else _empty(kind, shape)
    low, high = data & 15, data >> 4
    values = torch.stack([low, high], -1).flatten()[: int(np.prod(shape, dtype=np.int64))].reshape(shape)
    return ((values ^ 8).to(torch.int8) - 8) if kind == TensorProto.INT4 else values


def _empty(kind: int, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=TYPES[kind].dtype)


def _inline(proto: TensorProto) -> Tensor:
    kind, shape = int(proto.data_type), tuple(proto.dims)
    data = proto.raw_data
    if not data:
        array = onnx.numpy_helper.to_array(proto)
        if kind in FOUR_BITS:
            return torch.from_numpy(array.astype(np.int8 if kind == TensorProto.INT4 else np.uint8))
        data = np.ascontiguousarray(array).tobytes()
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return _viewed(held, kind, shape)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not one.HasField("dim_value") for one in kind.shape.dim):
        return None
    return tuple(one.dim_value for one in kind.shape.dim)


def _port(value: onnx.ValueInfoProto, where: str) -> Port:
    shape = _shape(value)
    if shape is None or value.type.tensor_type.elem_type not in TYPES:
        raise CompileError(f"{where}: {value.name} has no static shape, or a type that torch does not have")
    return Port(value.name, shape, TYPES[value.type.tensor_type.elem_type].dtype)


def parts_of(model: str | Path | onnx.ModelProto, folder: str | Path | None = None) -> Parts:
    """Raises ModelError for a file that is no ONNX model."""
    place = None if folder is None else Path(folder)
    if isinstance(model, onnx.ModelProto):
        return Parts(model, place, model.graph.name or "the graph")
    try:
        proto = onnx.load(model, load_external_data=False)
    except Exception as error:  # protobuf's own
        raise ModelError(f"cannot read {model}: {error}") from error
    return Parts(proto, place or Path(model).parent, str(model))


def folded(tensor: Tensor, kind: int) -> Constant:
    """A constant that lowering computed."""
    held = tensor.contiguous()
    raw = held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b""
    key = (hashlib.sha256(raw).hexdigest(), kind, tuple(held.shape))
    return Constant(kind, tuple(held.shape), key, held.to)
