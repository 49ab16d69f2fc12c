"""For each rule of targets/tables/qnn.toml a graph that breaks it and one that says the same in a form that passes.

Shapes are the smallest that show the effect. MADE is (model, feeds), as tests/qdq_models.py builds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx

from tests.qdq_models import Array, Builder

Made: TypeAlias = tuple[onnx.ModelProto, dict[str, Array]]
Maker: TypeAlias = Callable[[], Made]
SHAPE = (1, 8, 16)
INT64: Any = partial(np.array, dtype=np.int64)


class Case(NamedTuple):
    """`rule` without its "qnn/"."""

    rule: str
    planted: Maker
    clean: Maker

    @property
    def label(self) -> str:
        """For test names; a rule may have several cases."""
        return self.rule


def done(b: Builder, *outputs: str) -> Made:
    return b.model(*outputs), b.feeds


def unary(
    op: str, act: str | None = "uint16", out: str | None = "", extra: Sequence[Any] = (), shape: Sequence[int] = SHAPE,
    low: float = -2.0, high: float = 2.0, opset: int = 21, **attributes: Any,
) -> Made:  # fmt: skip
    b = Builder(act, opset)
    x = b.input(*shape, low=low, high=high)
    return done(b, b.op(op, [x, *map(b.constant, extra)], act=act if out == "" else out, **attributes))


def binary(op: str, first: str | None = "uint16", second: str | None = "uint16", out: str | None = "uint16") -> Made:
    b = Builder()
    return done(b, b.op(op, [b.input(*SHAPE, act=first, low=0.5), b.input(*SHAPE, act=second, low=0.5)], act=out))


def linear(
    op: str = "MatMul", act: str | None = "uint16", dtype: str = "int8", axis: int | None = 1, out: str | None = "",
    bias: str = "", bias_gain: float = 1.0, smallest: float = 0.2, rank: int = 2, zero: int = 0, block: int = 0,
) -> Made:  # fmt: skip
    """x[…, 32] · W[32, 16] as MatMul, Gemm or Conv1x1; `smallest`: the least output channel's size, the largest is 1.

    bias_gain: the bias' scale over what it must be. axis: of the scales, 1 for output channels in [K, N] terms.
    """
    b = Builder(act)
    weight = b.random(32, 16) * np.array([*np.linspace(0.5, 1, 15), smallest], np.float32)
    spatial = (4, 4) if op == "Conv" else ()
    x = b.input(*(1, 2, 2)[5 - rank :], 8, 32) if op == "MatMul" else b.input(1 if spatial else 8, 32, *spatial)
    if op == "Conv":
        weight, axis = weight.T[:, :, None, None], None if axis is None else 1 - axis
    stored = b.weight(weight, dtype, axis, block=block, zero=zero)
    inputs = [x, stored]
    if bias:
        scale = None
        if bias == "int32":
            pair = b.nodes[0].input[1], b.nodes[-1].input[1]
            scale = np.asarray(b.values[pair[0]] * b.values[pair[1]] * bias_gain, np.float32)
        inputs.append(b.weight(b.random(16), bias, None if scale is None or scale.ndim == 0 else 0, scale=scale))
    return done(b, b.op(op, inputs, act=act if out == "" else out))


def product(first: str | None, second: str | None, out: str | None = "uint16", stored: int = -1) -> Made:
    """MatMul of two values [2, 8, 16] and [2, 16, 8]; `stored`: the operand that is a constant."""
    b = Builder()
    shapes, types = [(2, 8, 16), (2, 16, 8)], [first, second]
    values = [
        b.weight(b.random(*shapes[i]), types[i] or "") if i == stored else b.input(*shapes[i], act=types[i])
        for i in (0, 1)
    ]
    return done(b, b.op("MatMul", values, act=out))


def norm(
    op: str = "LayerNormalization", act: str | None = "uint16", gamma: str = "uint8", beta: str = "", axis: int = -1,
    out: str | None = "", shape: Sequence[int] = SHAPE, opset: int = 21,
) -> Made:  # fmt: skip
    b = Builder(act, opset)
    x = b.input(*shape)
    scale = b.random(*shape[axis:], low=0.5, high=1.5)
    inputs = [x, b.weight(scale, gamma) if gamma else b.constant(scale)]
    if beta:
        inputs.append(b.weight(b.random(shape[-1]), beta))
    return done(b, b.op(op, inputs, act=act if out == "" else out, axis=axis))


def where(act: str | None = "uint16", out: str | None = "uint16") -> Made:
    b = Builder()
    chosen = b.constant(b.rng.random(SHAPE) > 0.5)
    return done(b, b.op("Where", [chosen, b.input(*SHAPE, act=act), b.input(*SHAPE, act=act)], act=out))


def moved(op: str, gain: float, extra: Sequence[Any], shape: Sequence[int] = (8, 16), **attributes: Any) -> Made:
    """An operator that moves values; the output's scale is `gain` times the input's."""
    b = Builder()
    x = b.input(*shape)
    scale = float(b.values[b.nodes[0].input[1]])
    zero = int(b.values[b.nodes[0].input[2]])
    y = b.node(op, [x, *map(b.constant, extra)], **attributes)
    return done(b, b.pair(y, scale=scale * gain, zero=zero))


def table(gain: float) -> Made:
    """Rows of a stored table, by an input of indices; the rows' scale is `gain` times the table's."""
    b = Builder()
    indices = "indices"
    b.inputs.append(onnx.helper.make_tensor_value_info(indices, onnx.TensorProto.INT64, [2]))
    b.values[indices] = b.feeds[indices] = INT64([2, 5])
    stored = b.weight(b.random(8, 16), "uint16")
    scale, zero = (b.values[name] for name in b.nodes[0].input[1:])
    return done(b, b.pair(b.node("Gather", [stored, indices]), scale=float(scale) * gain, zero=int(zero)))


def scatter_elements(gain: float) -> Made:
    """One row replaced; the new row's scale is `gain` times the others'."""
    b = Builder()
    x = b.input(8, 16)
    scale, zero = (b.values[name] for name in b.nodes[0].input[1:])
    row = b.pair(b.input(1, 16, act=None), scale=float(scale) * gain, zero=int(zero))
    y = b.node("ScatterElements", [x, b.constant(np.zeros((1, 16), np.int64)), row])
    return done(b, b.pair(y, scale=float(scale), zero=int(zero)))


def scatter(refused: bool) -> Made:
    """Two rows put in front of what is there: by ScatterND, or by Slice and Concat."""
    b = Builder()
    base, rows = b.input(8, 16), b.input(2, 16)
    if refused:
        return done(b, b.op("ScatterND", [base, b.constant(INT64([[0], [1]])), rows]))
    rest = b.op("Slice", [base, *(b.constant(INT64([i])) for i in (2, 8, 0))])
    return done(b, b.op("Concat", [rows, rest], axis=0))


def add_norm(stored: Sequence[int], shape: Sequence[int] = (4, 8, 16), op: str = "Add") -> Made:
    b = Builder()
    summed = b.op(op, [b.input(*shape), b.weight(b.random(*stored), "uint16")])
    return done(b, b.op("LayerNormalization", [summed, b.weight(b.random(16, low=0.5, high=1.5), "uint8")]))


def dynamic() -> Made:
    """The second dimension of everything is "n"."""
    model, feeds = unary("Relu")
    del model.graph.value_info[:]
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[1].dim_param = "n"
    return model, feeds


def no_inputs() -> Made:
    b = Builder()
    return done(b, b.op("Relu", [b.weight(b.random(4, 4), "uint16")]))


def zero_scale() -> Made:
    """An input quantized with scale 0: by the standard everything becomes 0."""
    model, feeds = unary("Relu")
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == model.graph.node[0].input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(np.zeros((), np.float32), scale.name))
    return model, feeds


def float_middle(op: str) -> Made:
    """A quantized graph whose operator in the middle was forgotten."""
    b = Builder()
    middle = b.node(op, [b.op("Relu", [b.input(*SHAPE, low=0.5)])])
    return done(b, b.op("Relu", [b.pair(b.node("Abs", [middle]))]))


RELU: Maker = partial(unary, "Relu")
MATMUL: Maker = linear
ATTENTION: Maker = partial(product, "uint16", "int16")
CASES = [
    Case("dynamic-shape", dynamic, RELU),
    Case("no-inputs", no_inputs, RELU),
    Case("rank", partial(unary, "Relu", shape=(1, 2, 1, 2, 2, 4)), partial(unary, "Relu", shape=(1, 2, 2, 2, 4))),
    Case("rank-4", partial(unary, "Gelu", shape=(1, 2, 2, 2, 8)), partial(unary, "Gelu", shape=(2, 2, 2, 8))),
    Case("rank-4-linear", partial(linear, rank=5), partial(linear, rank=4)),
    Case(
        "rank-4-s16",
        partial(unary, "Transpose", "int16", shape=(1, 2, 2, 4, 4), perm=[0, 1, 3, 2, 4]),
        partial(unary, "Transpose", "int16", shape=(2, 2, 4, 4), perm=[0, 2, 1, 3]),
    ),
    Case("refused-operator", partial(scatter, True), partial(scatter, False)),
    Case(
        "refused-operator", partial(unary, "Einsum", equation="abc->acb"), partial(unary, "Transpose", perm=[0, 2, 1])
    ),
    Case("refused-operator", partial(unary, "Erf"), partial(unary, "Gelu")),
    Case(
        "gather-scales",
        partial(moved, "Gather", 1.5, [INT64([2, 5])]),
        partial(moved, "Gather", 1.0, [INT64([2, 5])]),
    ),
    Case(
        "gather-nd",
        partial(moved, "GatherND", 1.0, [INT64([[0], [2], [3], [7], [5]])], shape=(8, 2, 16)),
        partial(moved, "Gather", 1.0, [INT64([0, 2, 3, 7, 5])], shape=(8, 2, 16)),
    ),
    Case("gather-scales", partial(table, 1.5), partial(table, 1.0)),
    Case("asymmetric-channels", partial(linear, zero=3), MATMUL),
    Case("input-channel-scales-conv", partial(linear, "Conv", axis=0), partial(linear, "Conv")),
    Case("blocks-u8", partial(linear, act="uint8", dtype="int4", axis=0, block=16), partial(linear, act="uint8")),
    Case("weights-16-u8", partial(linear, act="uint8", dtype="int16", axis=None), partial(linear, act="uint8")),
    Case(
        "first-operand-stored",
        partial(product, "uint16", "uint16", stored=0),
        partial(product, "uint16", "int16", stored=0),
    ),
    Case("float-beside-channels", partial(linear, "Gemm", act=None), partial(linear, "Gemm")),
    Case("unlike-beside-channels", partial(linear, "Conv", out="uint8"), partial(linear, "Conv")),
    Case("bias-type", partial(linear, "Gemm", bias="uint8"), partial(linear, "Gemm", bias="int32")),
    Case("layer-norm-gamma", partial(norm, gamma="int8"), norm),
    Case("layer-norm-gamma", partial(norm, gamma="uint16"), partial(norm, gamma="int16")),
    Case("layer-norm-gamma", partial(norm, act="uint8", gamma="int16"), partial(norm, act="uint8")),
    Case("layer-norm-axis", partial(norm, axis=-2), norm),
    Case("no-float-form", partial(unary, "Gelu", out="uint8"), partial(unary, "Gelu")),
    Case("no-float-form", partial(where, out="uint8"), where),
    Case("no-float-form-unquantized", partial(float_middle, "Elu"), partial(unary, "Elu")),
    Case("attention-u16", partial(product, "uint16", "uint16"), ATTENTION),
    Case("attention-8", partial(product, "uint16", "int8"), ATTENTION),
    Case("u8-weights", partial(linear, dtype="uint8", axis=None), partial(linear, axis=None)),
    Case("input-channel-scales", partial(linear, axis=0), MATMUL),
    Case("scale-spread", partial(linear, smallest=1e-6), partial(linear, smallest=1e-4)),
    Case("scale-spread", partial(linear, "Conv", smallest=1e-6), partial(linear, "Conv", smallest=1e-4)),
    Case("scatter-scales", partial(scatter_elements, 0.5), partial(scatter_elements, 1.0)),
    Case(
        "blocks-batch", partial(linear, dtype="int4", axis=0, block=16, rank=4), partial(linear, dtype="int4", rank=4)
    ),
    Case("blocks-axis", partial(linear, dtype="int4", axis=1, block=16), partial(linear, dtype="int4")),
    Case("bias-scale", partial(linear, "Gemm", bias="int32", bias_gain=0.01), partial(linear, "Gemm", bias="int32")),
    Case(
        "reciprocal", partial(unary, "Reciprocal", low=0.1, high=0.3), partial(unary, "Reciprocal", low=0.5, high=1.2)
    ),
    Case("broadcast-norm", partial(add_norm, (1, 8, 16)), partial(add_norm, (4, 8, 16))),
    Case("broadcast-norm", partial(add_norm, (1, 8, 16), op="Mul"), partial(add_norm, (4, 1, 16), op="Mul")),
    Case("log-16", partial(unary, "Log", low=0.5), partial(unary, "Log", "uint8", low=0.5)),
    Case("cumsum-8", partial(unary, "CumSum", "uint8", extra=[INT64(1)]), partial(unary, "CumSum", extra=[INT64(1)])),
    Case("softmax-s8", partial(unary, "Softmax", "int8"), partial(unary, "Softmax", "uint8")),
    Case("softplus-16", partial(unary, "Softplus"), partial(unary, "Softplus", "uint8")),
    Case("positive-scales", zero_scale, RELU),
    Case("blocks-float", partial(linear, dtype="int4", axis=0, block=16), partial(linear, dtype="int4")),
    Case("layer-norm-float", partial(norm, gamma=""), partial(norm, beta="int32")),
    Case("layer-norm-float", partial(norm, beta="uint8"), norm),
    Case("pow-float", partial(unary, "Pow", extra=[np.float32(2)], low=0.5), partial(binary, "Pow")),
    Case("float-inside", partial(unary, "Mish"), partial(unary, "HardSwish")),
    Case(
        "max-pool",
        partial(unary, "MaxPool", shape=(1, 4, 8, 8), kernel_shape=[2, 2]),
        partial(unary, "MaxPool", "int8", shape=(1, 4, 8, 8), kernel_shape=[2, 2]),
    ),
    Case("unlike-types", partial(binary, "Add", second="uint8"), partial(binary, "Add")),
    Case("unlike-types", partial(unary, "Softmax", out="uint8"), partial(unary, "Softmax")),
    Case(
        "moved-scales",
        partial(moved, "Gather", 1.5, [INT64([2])]),
        partial(moved, "Gather", 1.0, [INT64([2])]),
    ),
    Case(
        "moved-scales",
        partial(moved, "Reshape", 1.5, [INT64([16, 8])]),
        partial(moved, "Reshape", 1.0, [INT64([16, 8])]),
    ),
    Case("unlike-output", partial(product, "int16", "int16"), ATTENTION),
    Case("unlike-output", partial(linear, axis=None, out="uint8"), partial(linear, axis=None)),
    Case("unquantized", partial(float_middle, "Sqrt"), partial(unary, "Sqrt", low=0.5)),
    Case("operator", partial(unary, "Shrink"), RELU),
    Case("types", partial(unary, "Neg", "int8"), partial(unary, "Neg", "uint8")),
]
