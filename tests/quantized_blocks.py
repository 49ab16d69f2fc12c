"""A transformer block in which every value is quantized, healthy or with a fault that the HTP compiler lets pass.

Ranges are those of the feeds, as calibration would measure them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
from onnx import TensorProto, helper, numpy_helper

from vdq_export.graph import Array, Graph

OPSET = [helper.make_opsetid("", 21)]
FAULTS = {  # -> the node that is to be named
    "reciprocal": "attn.norm/Reciprocal",  # 16-bit Reciprocal of what lies below 1
    "attention": "attn/MatMul_1",  # its second operand in u16
    "broadcast": "norm/LayerNormalization",  # behind an Add of a constant broadcast over the batch
    "weight": "ffn.up/MatMul",  # weight scales along the input channel
    "refused": "norm/LayerNormalization",  # gamma in s8: does not compile
}


class Builder:
    """Computes every value while it writes the node, and quantizes it to the range that came out."""

    def __init__(self, seed: int = 0, dtype: str = "uint16") -> None:
        self.random = np.random.default_rng(seed)
        self.dtype = dtype
        self.feeds: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.params: list[onnx.TensorProto] = []
        self.arrays: dict[str, Array] = {}

    def input(self, name: str, *shape: int, scale: float = 1.0) -> str:
        self.arrays[name] = self.feeds[name] = (self.random.standard_normal(shape) * scale).astype(np.float32)
        return self.settle(name)

    def op(self, kind: str, *inputs: str, name: str, **attrs: Any) -> str:
        """The settled output of an operator."""
        node = helper.make_node(kind, list(inputs), [name], name=name, **attrs)
        self.nodes.append(node)
        known = [numpy_helper.from_array(self.arrays[one], one) for one in dict.fromkeys(inputs)]
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        alone = helper.make_model(helper.make_graph([node], name, [], [result], known), opset_imports=OPSET)
        self.arrays[name] = onnx.reference.ReferenceEvaluator(alone).run(None, {})[0].astype(np.float32)
        return self.settle(name)

    def settle(self, value: str, dtype: str = "") -> str:
        """Put a Q/DQ pair behind `value`: its own, or behind a settled one a second pair of another type."""
        array = self.arrays[value]
        s, z = self._parameters(value, array, dtype or self.dtype)
        self.nodes.append(helper.make_node("QuantizeLinear", [value, s, z], [f"{value}/Q"], f"{value}/Q"))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{value}/Q", s, z], [f"{value}/DQ"], f"{value}/DQ"))
        self.arrays[f"{value}/DQ"] = array
        return f"{value}/DQ"

    def constant(self, name: str, values: Any, dtype: str = "uint16") -> str:
        """A constant behind its DequantizeLinear, per tensor."""
        array = np.asarray(values, np.float32)
        parameters = self._parameters(name, array, dtype)
        scale, zero = (self.arrays[one] for one in parameters)
        codes = np.clip(np.rint(array / scale) + zero, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)
        return self._dequantize(name, codes, parameters, array)

    def weight(self, name: str, rows: int, columns: int, axis: int = 1, varied: int | None = None) -> str:
        """[rows, columns] in int8 with a scale per index of `axis`; 1 is per output channel.

        varied: the axis along which magnitudes vary 20-fold; the same one unless said otherwise.
        """
        along = axis if varied is None else varied
        array = self.random.standard_normal((rows, columns)) / np.sqrt(rows)
        array *= np.expand_dims(np.geomspace(0.05, 1, array.shape[along]), 1 - along)
        scale = (np.abs(array).max(axis=1 - axis) / 127).astype(np.float32)
        codes = np.rint(array / np.expand_dims(scale, 1 - axis)).astype(np.int8)
        parameters = [self.param(f"{name}.s", scale), self.param(f"{name}.z", np.zeros(len(scale), np.int8))]
        return self._dequantize(name, codes, parameters, codes * np.expand_dims(scale, 1 - axis), axis=axis)

    def param(self, name: str, array: Any) -> str:
        """A constant as it stands."""
        self.arrays[name] = np.asarray(array)
        self.params.append(numpy_helper.from_array(self.arrays[name], name))
        return name

    def graph(self, *outputs: str) -> Graph:
        ends = [
            [helper.make_tensor_value_info(one, TensorProto.FLOAT, self.arrays[one].shape) for one in names]
            for names in (self.feeds, outputs)
        ]
        model = helper.make_model(
            helper.make_graph(self.nodes, "test", *ends, self.params), opset_imports=OPSET, ir_version=10
        )
        onnx.checker.check_model(model)
        return Graph.from_proto(onnx.shape_inference.infer_shapes(model))

    def _parameters(self, name: str, array: Array, dtype: str) -> list[str]:
        """Scale and zero point, 0-d, of a per-tensor quantizer; signed types are symmetric."""
        info = np.iinfo(dtype)
        low, high = min(float(array.min()), 0.0), max(float(array.max()), 1e-6)
        scale = np.float32(max(-low, high) / info.max if info.min < 0 else (high - low) / info.max)
        zero = 0 if info.min < 0 else round(-low / float(scale))
        return [self.param(f"{name}.s", scale), self.param(f"{name}.z", np.array(zero, dtype))]

    def _dequantize(self, name: str, codes: Array, parameters: Sequence[str], array: Array, **attrs: Any) -> str:
        names = [self.param(f"{name}.codes", codes), *parameters]
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name], name, **attrs))
        self.arrays[name] = np.asarray(array, np.float32)
        return name


def linear(make: Builder, x: str, name: str, width: int, axis: int = 1, varied: int | None = None) -> str:
    w = make.weight(f"{name}.weight", make.arrays[x].shape[-1], width, axis, varied)
    y = make.op("MatMul", x, w, name=f"{name}/MatMul")
    return make.op("Add", y, make.constant(f"{name}.bias", make.random.standard_normal(width) / 8), name=f"{name}/Add")


def layer_norm(make: Builder, x: str, name: str, gamma_type: str) -> str:
    width = make.arrays[x].shape[-1]
    gamma = make.constant(f"{name}.gamma", 1 + make.random.standard_normal(width) / 8, gamma_type)
    beta = make.random.integers(-1000, 1000, width).astype(np.int32)
    scale = [make.param(f"{name}.beta.s", np.float32(1e-4))]
    beta_settled = make._dequantize(f"{name}.beta", beta, scale, beta * np.float32(1e-4))
    return make.op("LayerNormalization", x, gamma, beta_settled, name=f"{name}/LayerNormalization", axis=-1)


def rms_norm(make: Builder, x: str, name: str, *, reciprocal: bool) -> str:
    """x ÷ √mean(x²), or times the reciprocal, which the HTP computes wrongly where it leaves [0, 1]."""
    squares = make.op("Mul", x, x, name=f"{name}/Mul")
    axes = make.param(f"{name}.axes", np.array([-1]))
    root = make.op("Sqrt", make.op("ReduceMean", squares, axes, name=f"{name}/ReduceMean"), name=f"{name}/Sqrt")
    if not reciprocal:
        return make.op("Div", x, root, name=f"{name}/Div")
    return make.op("Mul", x, make.op("Reciprocal", root, name=f"{name}/Reciprocal"), name=f"{name}/Mul_1")


def block(fault: str = "", *, seed: int = 0, dtype: str = "uint16") -> tuple[Graph, dict[str, Array]]:
    """(attention and FFN over [4, 16, 32] tokens, its feeds), healthy or with the fault that FAULTS names a node of."""
    make = Builder(seed, dtype)
    x = make.input("x", 4, 16, 32)
    table = make.random.standard_normal((1, 16, 32) if fault == "broadcast" else (4, 16, 32)) * 3
    x = make.op("Add", x, make.constant("table", table), name="embed/Add")
    n = layer_norm(make, x, "norm", "int8" if fault == "refused" else "uint8")
    n = linear(make, n, "attn.to_small", 32)
    n = make.op("Mul", n, make.constant("small", 0.1), name="attn/Mul")
    n = rms_norm(make, n, "attn.norm", reciprocal=fault == "reciprocal")
    q, k, v = (linear(make, n, f"attn.to_{one}", 32) for one in "qkv")
    kt = make.op("Transpose", k, name="attn/Transpose", perm=[0, 2, 1])
    if dtype == "uint16":  # an operand that is left in uint16 is silently rounded to 8 bits
        kt = make.settle(kt, "int16")
        v = v if fault == "attention" else make.settle(v, "int16")
    scores = make.op("MatMul", q, kt, name="attn/MatMul")
    scores = make.op("Mul", scores, make.constant("attn.scale", 32**-0.5), name="attn/Mul_1")
    mixed = make.op("MatMul", make.op("Softmax", scores, name="attn/Softmax", axis=-1), v, name="attn/MatMul_1")
    x = linear(make, mixed, "attn.to_out", 32)  # no residual: it would hide what attention does wrong
    up = make.op("Gelu", linear(make, x, "ffn.up", 64, axis=0 if fault == "weight" else 1), name="ffn/Gelu")
    return make.graph(make.op("Add", x, linear(make, up, "ffn.down", 32), name="block/Add")), make.feeds
