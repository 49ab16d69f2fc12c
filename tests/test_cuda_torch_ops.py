"""Every standard operator that our graphs hold, lowered, beside onnxruntime: fed, and folded where all is constant."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from vdq_export.errors import CompileError
from vdq_export.targets.cuda.lower import UnknownOperatorError, lower
from vdq_export.targets.cuda.rules import RULES

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)
NEAR = 2e-6  # of the largest value: float32, sums of at most some dozens of numbers in another order


def floats(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int, dtype: str = "int64") -> Array:
    return np.array(values, dtype)


def scalar(value: float, dtype: str = "float32") -> Array:
    return np.array(value, dtype)


@dataclass(eq=False)
class Case:
    """given: arrays in the order of the inputs, None for absent ones. fed: positions that are inputs of the graph."""

    op: str
    given: tuple[Array | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    fed: tuple[int, ...] = (0,)
    outputs: int = 1
    domain: str = ""
    opset: int = 21

    def model(self, *, folded: bool = False) -> onnx.ModelProto:
        """Codes that numpy has no type for are dequantized again."""
        names = [f"in{i}" if one is not None else "" for i, one in enumerate(self.given)]
        held = {name: one for name, one in zip(names, self.given, strict=True) if one is not None}
        fed = set() if folded else {names[i] for i in self.fed}
        inputs = [_described(name, one) for name, one in held.items() if name in fed]
        constants = [numpy_helper.from_array(one, name) for name, one in held.items() if name not in fed]
        made = [f"out{i}" for i in range(self.outputs)]
        nodes = [helper.make_node(self.op, names, made, "the node", domain=self.domain, **self.attributes)]
        if self.op == "QuantizeLinear" and len(names) > 2 and held[names[2]].dtype.isbuiltin != 1:
            nodes[0].output[0] = "codes"
            nodes.append(helper.make_node("DequantizeLinear", ["codes", *names[1:]], made, "back"))
        results = [helper.make_empty_tensor_value_info(name) for name in made]
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "one operator", inputs, results, constants)
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    @cached_property
    def fed_run(self) -> tuple[onnx.ModelProto, list[Array]]:
        return _ran(self.model(), self.feeds())

    @cached_property
    def folded_run(self) -> tuple[onnx.ModelProto, list[Array]]:
        return _ran(self.model(folded=True), {})

    def feeds(self, folded: bool = False) -> dict[str, Array]:
        return {} if folded else {f"in{i}": one for i in self.fed if (one := self.given[i]) is not None}


def _described(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def _ran(model: onnx.ModelProto, feeds: dict[str, Array]) -> tuple[onnx.ModelProto, list[Array]]:
    """The model, its outputs described as onnxruntime's results, and these."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    results = ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)
    for one, array in zip(model.graph.output, results, strict=True):
        one.CopyFrom(_described(one.name, array))
    return model, results


X, Y, POSITIVE = floats(2, 3, 4), floats(2, 3, 4), np.abs(floats(2, 3, 4)) + 0.1
FLAGS = RANDOM.random((2, 3, 4)) > 0.5
COUNTS = RANDOM.integers(-9, 9, (2, 3, 4))
BOTH = (0, 1)
CODES = RANDOM.integers(-127, 128, (64, 6)).astype(np.int8)
WIDE = 3 * floats(4, 64)
Q, K, V = floats(2, 5, 24), floats(2, 7, 24), floats(2, 7, 24)
COS, SIN = np.cos(floats(9, 4)), np.sin(floats(9, 4))
TIES = (np.arange(-24, 24) / 2).astype(np.float32).reshape(3, 16)  # halves: round to even

ELEMENTWISE = [
    *[Case(op, (X, Y), fed=BOTH) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")],
    *[Case(op, (X, scalar(0.7))) for op in ("Add", "Sub", "Mul", "Div")],
    *[Case(op, (scalar(0.7), X), fed=(1,)) for op in ("Add", "Sub", "Mul", "Div", "Pow")],
    *[Case(op, (X, floats(4))) for op in ("Add", "Mul", "Div")],
    *[Case(op, (COUNTS, np.where(COUNTS == 0, 2, COUNTS[::-1] | 1)), fed=BOTH) for op in ("Add", "Div", "Mul")],
    Case("Div", (COUNTS, scalar(4, "int64"))),
    Case("Pow", (X, scalar(2.0))), Case("Pow", (POSITIVE, floats(2, 3, 4)), fed=BOTH), Case("Pow", (X, scalar(3.0))),
    Case("Mod", (COUNTS, scalar(5, "int64"))), Case("Mod", (X, scalar(0.3)), {"fmod": 1}),
    *[Case(op, (X,)) for op in (
        "Abs", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
        "LeakyRelu", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sign", "Sin", "Softplus", "Tanh",
    )],
    *[Case(op, (POSITIVE,)) for op in ("Log", "Sqrt")],
    Case("Round", (TIES,)), Case("LeakyRelu", (X,), {"alpha": 0.3}), Case("Elu", (X,), {"alpha": 0.3}),
    Case("Gelu", (X,)), Case("Gelu", (X,), {"approximate": "tanh"}),
    Case("Clip", (X, scalar(-0.3), scalar(0.5))), Case("Clip", (X, None, scalar(0.5))), Case("Clip", (X,)),
    Case("Clip", (CODES, scalar(-7, "int8"), scalar(7, "int8"))),
    Case("Where", (FLAGS, X, Y), fed=(0, 1, 2)), Case("Where", (FLAGS, scalar(0.0), X), fed=(0, 2)),
    Case("Where", (FLAGS, scalar(0.0), scalar(-3e38))), Case("Where", (FLAGS, COUNTS, scalar(3, "int64")), fed=BOTH),
    *[Case(op, (COUNTS, COUNTS[::-1].copy()), fed=BOTH) for op in (
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")],
    Case("Greater", (X, scalar(0.1))), Case("Equal", (COUNTS, scalar(3, "int64"))),
    *[Case(op, (FLAGS, FLAGS[::-1].copy()), fed=BOTH) for op in ("And", "Or", "Xor")], Case("Not", (FLAGS,)),
    Case("Cast", (10 * X,), {"to": onnx.TensorProto.INT64}), Case("Cast", (COUNTS,), {"to": onnx.TensorProto.FLOAT}),
    Case("Cast", (X,), {"to": onnx.TensorProto.BOOL}), Case("Cast", (10 * X,), {"to": onnx.TensorProto.INT8}),
    Case("Cast", (np.abs(10 * X),), {"to": onnx.TensorProto.UINT8}),
    Case("Cast", (X,), {"to": onnx.TensorProto.DOUBLE}), Case("Cast", (FLAGS,), {"to": onnx.TensorProto.FLOAT}),
    Case("CastLike", (COUNTS, X), fed=BOTH), Case("CastLike", (X, COUNTS), fed=BOTH),
]  # fmt: skip
MOVES = [
    Case("Reshape", (X, ints(4, -1))), Case("Reshape", (X, ints(0, 12))), Case("Reshape", (X, ints(-1))),
    Case("Transpose", (X,)), Case("Transpose", (X,), {"perm": [1, 0, 2]}),
    Case("Unsqueeze", (X, ints(0, -1))), Case("Unsqueeze", (X, ints(3, 1))), Case("Squeeze", (X[:1], ints(0))),
    Case("Squeeze", (X[:1, :, :1],)), Case("Flatten", (X,)), Case("Flatten", (X,), {"axis": 2}),
    Case("Concat", (X, Y, X), {"axis": 1}, fed=BOTH), Case("Concat", (COUNTS, COUNTS), {"axis": -1}),
    Case("Split", (X, ints(1, 3)), {"axis": 2}, outputs=2),
    Case("Split", (X,), {"axis": 1, "num_outputs": 2}, outputs=2),
    Case("Slice", (X, ints(1), ints(9), ints(2))), Case("Slice", (X, ints(-3, 0), ints(-1, 1), ints(2, 0))),
    Case("Slice", (X, ints(0), ints(4), ints(-1), ints(2))), Case("Slice", (X, ints(0, 1), ints(1, 3))),
    Case("Slice", (X, ints(-1), ints(-99), ints(2), ints(-1))), Case("Slice", (X, ints(3), ints(0), ints(2), ints(-2))),
    Case("Slice", (X, ints(2), ints(2), ints(1))),
    Case("Gather", (X, ints(2, 0, -1)), {"axis": 2}), Case("Gather", (X, scalar(-1, "int64")), {"axis": 1}),
    Case("Gather", (X, RANDOM.integers(-3, 3, (2, 2))), {"axis": 1}, fed=BOTH),
    Case("GatherElements", (X, RANDOM.integers(-4, 4, (2, 3, 2))), {"axis": 2}, fed=BOTH),
    Case("GatherND", (X, RANDOM.integers(-2, 2, (5, 2))), fed=BOTH),
    Case("GatherND", (X, RANDOM.integers(0, 3, (2, 1))), {"batch_dims": 1}, fed=BOTH),
    Case("ScatterND", (X, np.array([[0, 1], [1, -1]]), floats(2, 4)), fed=(0, 2)),
    Case("ScatterND", (X, np.array([[0], [0]]), floats(2, 3, 4)), {"reduction": "add"}, fed=(0, 2)),
    Case("ScatterElements", (X, RANDOM.integers(-4, 4, (2, 3, 1)), floats(2, 3, 1)), {"axis": 2}, fed=(0, 2)),
    Case("ScatterElements", (X, np.ones((2, 3, 2), np.int64), floats(2, 3, 2)), {"axis": 2, "reduction": "add"}),
    Case("Expand", (X[:, :1], ints(3, 1))), Case("Expand", (X[:1], ints(5, 2, 1, 1))), Case("Tile", (X, ints(1, 2, 3))),
    Case("Pad", (X, ints(0, 1, 2, 0, 0, 3))), Case("Pad", (X, ints(1, 2), scalar(-7.0), ints(-1))),
    *[Case("Pad", (X, ints(0, 2, 1, 0, 1, 3)), {"mode": mode}) for mode in ("reflect", "edge", "wrap")],
    Case("DepthToSpace", (floats(1, 8, 2, 3),), {"blocksize": 2}),
    Case("DepthToSpace", (floats(1, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", (floats(1, 2, 4, 6),), {"blocksize": 2}),
    Case("Trilu", (X,)), Case("Trilu", (X, scalar(-1, "int64")), {"upper": 0}),
    Case("Range", (scalar(2, "int64"), scalar(11, "int64"), scalar(3, "int64")), fed=()),
    Case("ConstantOfShape", (ints(2, 3),), {"value": numpy_helper.from_array(ints(5))}, fed=()),
]  # fmt: skip
REDUCTIONS = [
    *[Case(f"Reduce{name}", (X, ints(1, -1)), {"keepdims": keep}) for keep in (0, 1) for name in (
        "Mean", "Sum", "SumSquare", "L1", "L2", "Max", "Min", "Prod")],
    Case("ReduceMean", (X,)), Case("ReduceSum", (X,), {"noop_with_empty_axes": 1}),
    Case("ReduceSum", (COUNTS, ints(0))),
    Case("ReduceMax", (COUNTS, ints(2))),
    *[Case("CumSum", (X, scalar(1, "int64")), {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)],
    Case("ArgMax", (X,), {"axis": 2, "keepdims": 0}),
]  # fmt: skip
PRODUCTS = [
    Case("MatMul", (X, floats(4, 5))), Case("MatMul", (X, floats(2, 4, 5)), fed=BOTH),
    Case("MatMul", (floats(3, 3), X), fed=(1,)), Case("MatMul", (floats(4), floats(4, 5))),
    Case("Gemm", (X[0], floats(4, 5))), Case("Gemm", (X[0], floats(5, 4), floats(5)), {"transB": 1}, fed=(0, 2)),
    Case("Gemm", (X[0], floats(3, 5), floats(4, 5)), {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Conv", (floats(1, 3, 8), floats(4, 3, 3), floats(4)), {"pads": [1, 1]}),
    Case("Conv", (floats(1, 4, 8, 9), floats(6, 2, 3, 2)), {"group": 2, "strides": [2, 1], "pads": [1, 0, 2, 1]}),
    Case("Conv", (floats(2, 3, 4, 6, 6), floats(5, 3, 1, 2, 2), floats(5)), {
        "strides": [1, 2, 2], "kernel_shape": [1, 2, 2], "dilations": [1, 1, 1], "auto_pad": "NOTSET"}),
    Case("Einsum", (X, floats(4, 5)), {"equation": "bsi,ij->bsj"}, fed=BOTH),
    Case("MultiHeadAttention", (Q, K, V), {"num_heads": 3}, fed=(0, 1, 2), domain="com.microsoft"),
    Case("MultiHeadAttention", (Q, K, V, None, None, floats(2, 3, 5, 7)), {"num_heads": 3, "scale": 0.2},
         fed=(0, 1, 2, 5), domain="com.microsoft"),
    Case("MultiHeadAttention", (Q, K, V, floats(72)), {"num_heads": 3}, fed=(0, 1, 2), domain="com.microsoft"),
    Case("MultiHeadAttention", (Q, floats(2, 3, 7, 8), floats(2, 3, 7, 8)), {"num_heads": 3}, fed=(0, 1, 2),
         domain="com.microsoft"),
    Case("Attention", (Q, K, V, floats(5, 7)), {"q_num_heads": 3, "kv_num_heads": 3, "scale": 0.3}, fed=(0, 1, 2),
         opset=23),
    Case("Attention", (floats(1, 4, 5, 8), floats(1, 2, 7, 8), floats(1, 2, 7, 8)), fed=(0, 1, 2), opset=23),
]  # fmt: skip
NORMS = [
    Case("Softmax", (X,)), Case("Softmax", (X,), {"axis": 1}), Case("LogSoftmax", (X,)),
    Case("LayerNormalization", (X, floats(4), floats(4))), Case("LayerNormalization", (X, floats(4)), {"epsilon": 0.1}),
    Case("LayerNormalization", (X, floats(3, 4), floats(3, 4)), {"axis": 1}),
    Case("RMSNormalization", (X, floats(4)), {"epsilon": 0.1}, opset=23),
    Case("GroupNormalization", (floats(2, 6, 5), floats(6), floats(6)), {"num_groups": 3}),
    Case("InstanceNormalization", (floats(2, 3, 5), floats(3), floats(3))),
    *[Case("RotaryEmbedding", (floats(2, 5, 24), position, COS, SIN), {"interleaved": i}, domain="com.microsoft")
      for i in (0, 1) for position in (ints(0), ints(3), RANDOM.integers(0, 9, (2, 5)))],
    Case("RotaryEmbedding", (floats(2, 3, 5, 8), ints(0), COS, SIN), domain="com.microsoft"),
    Case("RotaryEmbedding", (floats(2, 5, 36), ints(0), COS, SIN), {"num_heads": 3, "rotary_embedding_dim": 8},
         domain="com.microsoft"),
    Case("RotaryEmbedding", (floats(2, 5, 24), floats(2, 5, 4), floats(2, 5, 4)), {"num_heads": 3}, opset=23),
    Case("RotaryEmbedding", (floats(2, 3, 5, 8), COS, SIN, RANDOM.integers(0, 9, (2, 5))), opset=23),
]  # fmt: skip
SCALES, ZEROS = np.abs(floats(64)) / 30 + 0.01, RANDOM.integers(-5, 6, 64)
FLOAT8 = ml_dtypes.float8_e4m3fn
QUANTIZERS = [
    *[Case("QuantizeLinear", (WIDE, scalar(0.02), scalar(zero, dtype))) for dtype, zero in (
        ("uint8", 117), ("int8", -3), ("uint16", 30000), ("int16", 5))],
    Case("QuantizeLinear", (TIES, scalar(1.0))), Case("QuantizeLinear", (WIDE, scalar(0.05), np.array(0, FLOAT8))),
    Case("QuantizeLinear", (np.array([[450.0, -470.0, 1e9, 0.0009, 17.0, 19.0]], np.float32), scalar(1.0),
                            np.array(0, FLOAT8))),
    *[Case("QuantizeLinear", (WIDE, SCALES, ZEROS.astype(dtype)), {"axis": 1}) for dtype in ("int8", "int16")],
    Case("QuantizeLinear", (WIDE, scalar(0.1), np.array(1, ml_dtypes.int4))),
    Case("QuantizeLinear", (WIDE, scalar(0.1), np.array(7, ml_dtypes.uint4))),
    Case("QuantizeLinear", (WIDE, np.abs(floats(4, 2)) + 0.01, np.zeros((4, 2), np.int8)),
         {"axis": 1, "block_size": 32}),
    *[Case("DequantizeLinear", (CODES.astype(dtype), scalar(0.02), scalar(3, dtype))) for dtype in (
        "int8", "int16", "int32")],
    Case("DequantizeLinear", (np.abs(CODES).astype(np.uint8), scalar(0.02), scalar(117, "uint8"))),
    Case("DequantizeLinear", (np.abs(CODES).astype(np.uint16) * 500, scalar(0.02), scalar(30000, "uint16"))),
    Case("DequantizeLinear", (CODES, SCALES[:6], ZEROS[:6].astype(np.int8)), {"axis": 1}),
    Case("DequantizeLinear", (CODES, SCALES), {"axis": 0}), Case("DequantizeLinear", (CODES, SCALES), {"axis": -2}),
    Case("DequantizeLinear", (CODES, np.abs(floats(2, 6)), np.ones((2, 6), np.int8)), {"axis": 0, "block_size": 32}),
    Case("DequantizeLinear", (CODES.clip(-7, 7).astype(ml_dtypes.int4), np.abs(floats(4, 6))), {
        "axis": 0, "block_size": 16}, fed=()),
    Case("DequantizeLinear", (CODES.clip(-7, 7)[:, :3].astype(ml_dtypes.int4), SCALES[:3]), {"axis": 1}, fed=()),
    Case("DequantizeLinear", (np.abs(CODES).clip(0, 15).astype(ml_dtypes.uint4), scalar(0.1),
                              np.array(7, ml_dtypes.uint4)), fed=()),
    Case("DequantizeLinear", (WIDE.astype(FLOAT8), scalar(0.3)), fed=()),
    Case("DequantizeLinear", (COUNTS.astype(np.int32) * 90000, scalar(1e-5)), fed=(0,)),
]  # fmt: skip
CASES = [*ELEMENTWISE, *MOVES, *REDUCTIONS, *PRODUCTS, *NORMS, *QUANTIZERS]
UNASKED = {  # not in onnxruntime's CPU provider, or another name of one that is tested
    "Swish", "SimplifiedLayerNormalization", "com.microsoft.QuantizeLinear", "com.microsoft.DequantizeLinear",
}  # fmt: skip


def compare(case: Case, *, folded: bool = False) -> None:
    model, expected = case.folded_run if folded else case.fed_run
    feeds = case.feeds(folded)
    program = lower(model, dtype=torch.float32)
    found = program({name: torch.from_numpy(array) for name, array in feeds.items()})
    for port, want in zip(program.outputs, expected, strict=True):
        assert (tuple(found[port.name].shape), found[port.name].dtype) == (want.shape, port.dtype)
        got, want = _comparable(found[port.name]), want.astype(np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=NEAR * max(np.abs(want).max(initial=0), 1e-30))


def _comparable(tensor: torch.Tensor) -> Array:
    array: Array = tensor.to(torch.float64).numpy()
    return array


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.op}" for i, case in enumerate(CASES)])
def test_an_operator_is_what_onnxruntime_computes(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.op}" for i, case in enumerate(CASES)])
def test_of_constants_it_is_folded_to_the_same(case: Case) -> None:
    compare(case, folded=True)
    program = lower(case.folded_run[0], dtype=torch.float32)
    assert {node.op for node in program.module.graph.nodes} == {"get_attr", "output"}


def test_every_rule_is_tested() -> None:
    tested = {f"{case.domain}.{case.op}".lstrip(".") for case in CASES}
    assert RULES.keys() - tested == UNASKED


@pytest.mark.parametrize("op", sorted({case.op for case in CASES} & RULES.keys() - {"Identity"}))
def test_a_wrong_rule_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another result of the same shape: each value moved by one part in 10⁴, integers by one, truths turned."""
    rule = RULES[op]

    def moved(value: torch.Tensor) -> torch.Tensor:
        if value.dtype == torch.bool:
            return ~value
        if value.dtype == torch.float8_e4m3fn:
            return (1.2 * value.float()).to(value.dtype)
        return value * (1 + 1e-4) + 1e-4 if value.is_floating_point() else value.to(torch.int64).add(1).to(value.dtype)

    def wrong(*arguments: Any, **attributes: Any) -> Any:
        found = rule.run(*arguments, **attributes)
        return tuple(moved(one) for one in found) if isinstance(found, tuple) else moved(found)

    monkeypatch.setitem(RULES, op, type(rule)(wrong, rule.kind, rule.static, rule.scalars, rule.exact))
    with pytest.raises(AssertionError):
        for case in CASES:
            if case.op == op:
                compare(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.op}" for i, case in enumerate(CASES)])
def test_in_sixteen_bits_it_is_near(case: Case, dtype: torch.dtype) -> None:
    """Within two roundings of inputs and one of the result, of a type of 8 or 11 bits, times what a sum gathers."""
    model, expected = case.fed_run
    program = lower(model, dtype=dtype)
    found = program({name: torch.from_numpy(array) for name, array in case.feeds().items()})
    floating = [i for i in case.fed if (one := case.given[i]) is not None and one.dtype.kind == "f"]
    tolerance = 16 * torch.finfo(dtype).eps
    for port, want in zip(program.outputs, expected, strict=True):
        got, want = _comparable(found[port.name]), want.astype(np.float64)
        assert got.shape == want.shape
        finite = np.isfinite(got) & (np.abs(want) < 6e4)
        if port.dtype.is_floating_point or not floating:
            np.testing.assert_allclose(got[finite], want[finite], rtol=tolerance, atol=tolerance * 4)


def test_an_unknown_operator_names_itself_its_node_and_the_file() -> None:
    case = Case("Det", (floats(3, 3),))
    with pytest.raises(UnknownOperatorError, match=r"one operator: no torch function for Det, node the node"):
        lower(case.fed_run[0])


def test_an_attribute_that_no_rule_knows_is_refused() -> None:
    model = Case("Softmax", (X,)).fed_run[0]
    model.graph.node[0].attribute.append(helper.make_attribute("temperature", 2.0))
    with pytest.raises(UnknownOperatorError, match=r"node the node is a form of Softmax .* 'temperature'"):
        lower(model)
    model = Case("Sqrt", (POSITIVE,)).fed_run[0]
    model.graph.node[0].attribute.append(helper.make_attribute("root", 3))
    with pytest.raises(UnknownOperatorError, match="attribute root"):
        lower(model)


def test_a_second_output_that_no_rule_gives_is_refused() -> None:
    with pytest.raises(UnknownOperatorError, match="more than one output"):
        lower(Case("LayerNormalization", (X, floats(4), floats(4)), outputs=2).fed_run[0])


@pytest.mark.parametrize(
    "case",
    [
        Case("ConstantOfShape", (ints(1, 2048, 1024),), fed=()),
        Case("Range", (scalar(0, "int64"), scalar(1 << 20, "int64"), scalar(1, "int64")), fed=()),
    ],
    ids=lambda case: case.op,
)
def test_what_has_no_operand_is_made_beforehand(case: Case) -> None:
    """However large: at run time nothing would say on which device."""
    program = lower(case.folded_run[0], device="meta")
    assert {node.op for node in program.module.graph.nodes} == {"get_attr", "output"}
    assert all(found.is_meta for found in program({}).values())


def test_a_shape_that_is_computed_is_refused() -> None:
    with pytest.raises(CompileError, match=r"Reshape node the node computes its shape \(input in1\)"):
        lower(Case("Reshape", (X, ints(4, -1)), fed=BOTH).fed_run[0])
