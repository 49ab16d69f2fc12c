"""A Q/DQ graph with one of everything that an encodings file has to say."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from vdq_export.graph import Array, Graph


def small_qdq(*, gain: float = 1.0, block: int = 0) -> Graph:
    """x → Gemm with an int8 weight per channel (or int4, in blocks) and int32 bias → + u8 constant → Softmax, read in
    u16 and, again, in s16.

    Shapes: x [4, 64], weight [64, 8], bias [8], shift [8], y [4, 4]. gain: of the activation scales, as bins differ.
    """
    random = np.random.default_rng(1)
    constants: dict[str, Array] = {}
    nodes: list[onnx.NodeProto] = []

    def pair(value: str, dtype: Any, scale: float, zero: int, name: str = "") -> str:
        name = name or value
        constants[f"{name}.s"], constants[f"{name}.z"] = np.float32(scale * gain), np.array(zero, dtype)
        nodes.append(helper.make_node("QuantizeLinear", [value, f"{name}.s", f"{name}.z"], [f"{name}/Q"], f"{name}/Q"))
        made = [f"{name}/Q", f"{name}.s", f"{name}.z"]
        nodes.append(helper.make_node("DequantizeLinear", made, [f"{name}/DQ"], f"{name}/DQ"))
        return f"{name}/DQ"

    def constant(name: str, codes: Array, scale: Array, zero: Array, **attributes: int) -> str:
        constants.update({f"{name}.q": codes, f"{name}.s": scale, f"{name}.z": zero})
        inputs = [f"{name}.q", f"{name}.s", f"{name}.z"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name, **attributes))
        return name

    def step(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], output, **attributes))
        return output

    weight_type: Any = ml_dtypes.int4 if block else np.int8
    codes = random.integers(-7, 8, (64, 8)).astype(weight_type)
    shape = (64 // block, 8) if block else (8,)
    scale = random.uniform(1e-2, 2e-2, shape).astype(np.float32)
    grouped = {"axis": 0, "block_size": block} if block else {"axis": 1}
    x = pair("x", np.uint16, 2 / 65535, 32768)
    weight = constant("weight", codes, scale, np.zeros(shape, weight_type), **grouped)
    bias_codes = random.integers(-100000, 100000, 8).astype(np.int32)
    bias_scale = random.uniform(1e-6, 1e-5, 8).astype(np.float32)
    bias = constant("bias", bias_codes, bias_scale, np.zeros(8, np.int32), axis=0)
    product = pair(step("Gemm", [x, weight, bias], "product"), np.uint8, 0.05, 121)
    shift = constant("shift", random.integers(0, 256, 8).astype(np.uint8), np.array(0.01, np.float32), np.uint8(100))
    shifted = pair(step("Add", [product, shift], "shifted"), np.uint16, 2e-4, 30000)
    soft = pair(step("Softmax", [shifted], "soft", axis=-1), np.uint16, 1 / 65535, 0)
    again = pair(soft, np.int16, 1 / 32767, 0, "soft.second")
    turned = pair(step("Transpose", [soft], "turned", perm=[1, 0]), np.uint16, 1 / 65535, 0)
    pair(step("MatMul", [again, turned], "inner"), np.uint16, 1e-4, 0)
    nodes[-1].output[0] = "y"

    tensors = [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.reshape(-1)) for n, a in
               ((n, np.asarray(a)) for n, a in constants.items())]  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "small", [value("x", TensorProto.FLOAT, [4, 64])], [value("y", TensorProto.FLOAT, [4, 4])], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(model))
