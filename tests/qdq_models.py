"""Tiny Q/DQ graphs, operator by operator, with ranges taken from one example run; and what QNN makes of them.

A graph is built eagerly: each operator is evaluated by onnx's reference evaluator as it is added, so that the scales
fit. Every builder method returns the name of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from vdq_export.graph import Graph

Array = np.ndarray[Any, Any]
FLOAT = onnx.TensorProto.FLOAT
QMAX = {"uint8": 255, "uint16": 65535, "int8": 127, "int16": 32767, "int4": 7}
TYPES = {"int4": onnx.TensorProto.INT4}  # types numpy lacks


class Builder:
    """`act`: the type activations get unless an operator asks for another; None: no Q/DQ at all."""

    def __init__(self, act: str | None = "uint16", opset: int = 21) -> None:
        self.act, self.opset = act, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.values: dict[str, Array] = {}
        self.feeds: dict[str, Array] = {}
        self.rng = np.random.default_rng(0)
        self.count = 0

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, *shape: int, act: str | None = "", low: float = -2.0, high: float = 2.0) -> str:
        """A float input with its Q/DQ pair inside."""
        name = self.fresh("x")
        self.inputs.append(helper.make_tensor_value_info(name, FLOAT, shape))
        self.values[name] = self.feeds[name] = self.rng.uniform(low, high, shape).astype(np.float32)
        return self.pair(name, act)

    def constant(self, array: Any) -> str:
        """A plain constant: shapes, axes, floats."""
        name = self.fresh("c")
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        self.values[name] = np.asarray(array)
        return name

    def pair(self, value: str, act: str | None = "", *, scale: float | None = None, zero: int | None = None) -> str:
        """value -> Q -> DQ, per tensor; symmetric for signed types. scale, zero: instead of the measured ones."""
        dtype = self.act if act == "" else act
        if dtype is None:
            return value
        low, high = min(float(self.values[value].min()), 0.0), max(float(self.values[value].max()), 0.0, 1e-6)
        unsigned = dtype.startswith("u")
        step = scale or ((high - low) if unsigned else max(-low, high)) / QMAX[dtype]
        if zero is None:
            zero = int(np.clip(round(-low / step), 0, QMAX[dtype])) if unsigned else 0
        s, z = self.constant(np.array(step, np.float32)), self.constant(np.array(zero, dtype))
        middle = self.node("QuantizeLinear", [value, s, z], out="q")
        return self.node("DequantizeLinear", [middle, s, z], out="d")

    def weight(
        self,
        array: Array,
        dtype: str = "int8",
        axis: int | None = None,
        *,
        block: int = 0,
        zero: int = 0,
        scale: Array | None = None,
    ) -> str:
        """A stored constant behind DequantizeLinear: one scale, one per channel of `axis`, or one per `block` along it.

        zero: zero point of signed types (unsigned ones get theirs from the values). scale: instead of the measured.
        """
        array = np.asarray(array, np.float32)
        limit = QMAX.get(dtype, 2**30)
        if dtype.startswith("u"):
            low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
            scale = np.array((high - low) / limit, np.float32)
            zero = round(-low / float(scale))
        elif scale is None:
            scale = _measured(array, axis, block) / np.float32(limit)
        full = np.repeat(scale, block, axis) if block else scale
        if scale.ndim == 1 and axis is not None:
            full = scale.reshape([-1 if i == axis else 1 for i in range(array.ndim)])
        lowest = 0 if dtype.startswith("u") else -limit
        stored = np.clip(np.rint(array / full) + zero, lowest, limit)
        kind = TYPES.get(dtype) or helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        inputs = [
            self._stored(kind, stored),
            self.constant(scale.astype(np.float32)),
            self._stored(kind, np.full(scale.shape, zero)),
        ]
        attributes = {} if axis is None else {"axis": axis}
        return str(
            self.node("DequantizeLinear", inputs, out="d", **attributes, **({"block_size": block} if block else {}))
        )

    def _stored(self, kind: int, values: Array) -> str:
        tensor = helper.make_tensor(self.fresh("w"), kind, values.shape, values.astype(np.int64).ravel().tolist())
        self.constants.append(tensor)
        self.values[tensor.name] = numpy_helper.to_array(tensor)
        return str(tensor.name)

    def random(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Array:
        return self.rng.uniform(low, high, shape).astype(np.float32)

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, out: str = "y", **attrs: Any) -> Any:
        """The bare operator, evaluated; the name of its output, or a list of names."""
        names = [self.fresh(out) for _ in range(outputs)]
        domain = attrs.pop("domain", "")
        made = helper.make_node(op, list(inputs), names, name=f"block/{op}{self.count}", domain=domain, **attrs)
        self.nodes.append(made)
        results = self._evaluate(made)
        self.values.update(zip(names, results, strict=True))
        return names[0] if outputs == 1 else names

    def op(self, op: str, inputs: Sequence[str], act: str | None = "", outputs: int = 1, **attrs: Any) -> Any:
        """The operator with Q/DQ behind each output."""
        names = self.node(op, inputs, outputs, **attrs)
        return self.pair(names, act) if outputs == 1 else [self.pair(name, act) for name in names]

    def model(self, *outputs: str, name: str = "g") -> onnx.ModelProto:
        made = [helper.make_tensor_value_info(o, FLOAT, self.values[o].shape) for o in outputs]
        graph = helper.make_graph(self.nodes, name, self.inputs, made, self.constants)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)

    def graph(self, *outputs: str) -> Graph:
        return Graph.from_proto(self.model(*outputs))

    def _evaluate(self, node: onnx.NodeProto) -> list[Array]:
        feeds = {name: self.values[name] for name in node.input if name}
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
        kinds = [helper.make_tensor_value_info(name, types[name], value.shape) for name, value in feeds.items()]
        made = [helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = helper.make_graph([node], "one", kinds, made)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return [np.asarray(result) for result in ReferenceEvaluator(proto).run(None, feeds)]


def _measured(array: Array, axis: int | None, block: int) -> Array:
    """Largest magnitudes: of everything, of each channel of `axis`, or of each block along it."""
    magnitude = np.abs(array)
    if axis is None:
        return np.maximum(magnitude.max(), 1e-6)
    if not block:
        found: Array = magnitude.max(tuple(i for i in range(array.ndim) if i != axis))
        return found
    return np.stack([part.max(axis) for part in np.split(magnitude, array.shape[axis] // block, axis)], axis)
