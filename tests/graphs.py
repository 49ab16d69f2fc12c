"""Small ONNX graphs made by hand, for tests of what looks at graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
WIDTH = 8


class Builder:
    """Collects nodes and initializers; every method returns the name of the value it made."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.params: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def op(self, kind: str, *inputs: str, name: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attrs))
        return name

    def param(self, name: str, value: object, dtype: str = "float32") -> str:
        self.params.append(numpy_helper.from_array(np.array(value, dtype=dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.param(name, self.random.standard_normal(shape))

    def linear(self, x: str, layer: str, width: int = WIDTH) -> str:
        y = self.op("MatMul", x, self.weight(f"{layer}.weight", width, width), name=f"{layer}/MatMul")
        return self.op("Add", y, self.weight(f"{layer}.bias", width), name=f"{layer}/Add")

    def model(self, outputs: list[str], inputs: tuple[str, ...] = ("x",), width: int = WIDTH) -> onnx.ModelProto:
        def described(name: str) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, width])

        graph = helper.make_graph(
            self.nodes, "test", [described(i) for i in inputs], [described(o) for o in outputs], self.params
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model)


def transformer(blocks: int = 6, equal_weights: bool = False) -> onnx.ModelProto:
    """Blocks of one structure in a row: attention over [1, 4, 8] tokens and an FFN, each with a residual connection."""
    make = Builder()
    x = "x"
    for index in range(blocks):
        if equal_weights:
            make.random = np.random.default_rng(1)
        b = f"blocks.{index}"
        q, k, v = (make.linear(x, f"{b}.attn.to_{p}") for p in "qkv")
        kt = make.op("Transpose", k, name=f"{b}.attn/Transpose", perm=[0, 2, 1])
        scores = make.op("MatMul", q, kt, name=f"{b}.attn/MatMul")
        scores = make.op("Softmax", scores, name=f"{b}.attn/Softmax", axis=-1)
        o = make.linear(make.op("MatMul", scores, v, name=f"{b}.attn/MatMul_1"), f"{b}.attn.to_out")
        x = make.op("Add", x, o, name=f"{b}/Add")
        up = make.op("Gelu", make.linear(x, f"{b}.ffn.up"), name=f"{b}.ffn/Gelu")
        x = make.op("Add", x, make.linear(up, f"{b}.ffn.down"), name=f"{b}/Add_1")
    return make.model([x])


def quantized_linear(scale: float = 0.05, zero_point: int = 128) -> onnx.ModelProto:
    """Q -> DQ -> MatMul with a DQ'ed int8 weight [8, 8], per output channel, then the bias."""
    make = Builder(2)
    s, z = make.param("proj.in.scale", scale), make.param("proj.in.zero_point", zero_point, "uint8")
    x = make.op("DequantizeLinear", make.op("QuantizeLinear", "x", s, z, name="proj/Q"), s, z, name="proj/DQ")
    w = make.param("proj.weight", make.random.integers(-127, 128, (WIDTH, WIDTH)), "int8")
    ws = make.param("proj.weight.scale", np.linspace(0.01, 0.02, WIDTH))
    w = make.op("DequantizeLinear", w, ws, name="proj.weight/DQ", axis=1)
    y = make.op("MatMul", x, w, name="proj/MatMul")
    return make.model([make.op("Add", y, make.weight("proj.bias", WIDTH), name="proj/Add")])


def renamed(model: onnx.ModelProto, name: Callable[[str], str], *, ends: bool = False) -> onnx.ModelProto:
    """A copy whose nodes, values and initializers (graph inputs and outputs too with `ends`) carry other names."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    fixed = set() if ends else {v.name for v in [*model.graph.input, *model.graph.output]}

    def new(old: str) -> str:
        return old if old in fixed or not old else name(old)

    for node in copy.graph.node:
        node.name = name(node.name)
        node.input[:] = [new(v) for v in node.input]
        node.output[:] = [new(v) for v in node.output]
    for value in [*copy.graph.input, *copy.graph.output, *copy.graph.value_info, *copy.graph.initializer]:
        value.name = new(value.name)
    return copy


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(n for n in model.graph.node if n.name == name)
    return found


def set_param(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def get_param(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def insert(model: onnx.ModelProto, after: str, kind: str, name: str) -> None:
    """Put a one-input operator behind the value `after`, in front of all its readers."""
    for reader in model.graph.node:
        reader.input[:] = [name if v == after else v for v in reader.input]
    position = next((i for i, n in enumerate(model.graph.node) if after in n.output), -1)
    model.graph.node.insert(position + 1, helper.make_node(kind, [after], [name], name=name))
