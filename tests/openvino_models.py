"""One linear in the forms that OpenVINO takes differently, each with what it then does.

Legend: M = 64 rows, K = 256 input channels, N = 128 output channels, x[1, M, K] of values in about ±10.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.commands import ENVIRONMENT
from vdq_export.devices import openvino_runtime
from vdq_export.graph import Graph
from vdq_export.metrics import sqnr_db

Array = np.ndarray[Any, Any]
M, K, N = 64, 256, 128


@dataclass(frozen=True)
class Case:
    """A form and what to expect. lint: the rule that speaks. refused: OpenVINO's words when it does not take it.

    activation: type of the quantized input, "" for a float one; activation_scale: one step, or one a channel.
    weight: type; qmax: its largest; zero_point, axis, group: of its DequantizeLinear.
    """

    name: str
    lint: str = ""
    integer: bool = True
    exact: bool = True
    refused: str = ""
    activation: str = "uint8"
    activation_zero: int = 120
    per_channel_input: bool = False
    weight: str = "int8"
    qmax: int = 63
    weight_zero: int = 0
    axis: int = 1
    group: int = 0
    rotary: bool = False

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name.replace(' ', '-')}.onnx"
        onnx.save(self.model(), path)
        return path

    def model(self) -> onnx.ModelProto:
        constants: list[onnx.TensorProto] = []
        nodes: list[onnx.NodeProto] = []
        value = self._turned(nodes, constants)
        value = self._rounded(value, nodes, constants) if self.activation else value
        weight = self._weight(nodes, constants)
        bias = np.random.default_rng(2).standard_normal(N).astype(np.float32)
        constants.append(numpy_helper.from_array(bias, "bias"))
        nodes.append(helper.make_node("MatMul", [value, weight], ["linear/MatMul"], name="linear/MatMul"))
        nodes.append(helper.make_node("Add", ["linear/MatMul", "bias"], ["sample"], name="linear/Add"))
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, M, K])]
        outputs = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, [1, M, N])]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _turned(self, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> str:
        """The input, through onnxruntime's own rotary embedding where that is the case."""
        if not self.rotary:
            return "x"
        table = np.ones((M, K // 2), np.float32)
        constants += [numpy_helper.from_array(table, "cos"), numpy_helper.from_array(0 * table, "sin")]
        constants.append(numpy_helper.from_array(np.zeros(1, np.int64), "position"))
        operands = ["x", "position", "cos", "sin"]
        nodes.append(helper.make_node("RotaryEmbedding", operands, ["turned"], name="turn", domain="com.microsoft"))
        return "turned"

    def _rounded(self, value: str, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> str:
        """Q/DQ of the input. Its range is narrower than the values for 16 bits, so that its clamp matters."""
        step = {"uint8": 0.09, "int8": 0.09, "uint16": 1e-4}[self.activation]
        scale, zero = np.array(step, np.float32), np.array(self.activation_zero, self.activation)
        if self.per_channel_input:
            scale, zero = np.linspace(0.08, 0.1, K, dtype=np.float32), np.full(K, zero)
        constants += [numpy_helper.from_array(scale, "x.scale"), numpy_helper.from_array(zero, "x.zero_point")]
        axis = {"axis": 2} if self.per_channel_input else {}
        parameters = ["x.scale", "x.zero_point"]
        nodes.append(helper.make_node("QuantizeLinear", [value, *parameters], ["x.q"], name="x/Quantize", **axis))
        nodes.append(helper.make_node("DequantizeLinear", ["x.q", *parameters], ["x.dq"], name="x/Dequantize", **axis))
        return "x.dq"

    def _weight(self, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> str:
        rng = np.random.default_rng(0)
        bound = self.qmax - abs(self.weight_zero)
        q: Array = rng.integers(-bound, bound + 1, (K, N)) + self.weight_zero
        count = (K // self.group, N) if self.group else (N if self.axis else K,)
        scale = rng.uniform(0.001, 0.002, count).astype(np.float32)
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.weight)) if self.weight != "int4" else TensorProto.INT4
        constants.append(helper.make_tensor("weight", kind, (K, N), q.flatten().tolist()))
        constants.append(helper.make_tensor("zero", kind, count, [self.weight_zero] * int(np.prod(count))))
        constants.append(numpy_helper.from_array(scale, "weight.scale"))
        attributes = {"axis": 0, "block_size": self.group} if self.group else {"axis": self.axis}
        operands = ["weight", "weight.scale", "zero"]
        nodes.append(helper.make_node("DequantizeLinear", operands, ["w"], name="linear/Weight", **attributes))
        return "w"


CASES = (
    Case("u8 x s8"),
    Case("s8 x s8", activation="int8", activation_zero=0),
    Case("weights up to 127", lint="openvino/saturation", qmax=127),
    Case("16-bit input", lint="openvino/sixteen-bit", activation="uint16", activation_zero=32768, integer=False,
         exact=False),
    Case("s4 weight", lint="openvino/float-kernel", weight="int4", qmax=7, integer=False),
    Case("s16 weight", lint="openvino/float-kernel", weight="int16", qmax=32767, integer=False),
    Case("grouped weight", lint="openvino/float-kernel", group=32, integer=False),
    Case("u8 weight", lint="openvino/float-kernel", weight="uint8", weight_zero=64, qmax=127, integer=False),
    Case("weight with zero point", lint="openvino/weight-zero-point", weight_zero=5, integer=False),
    Case("scales on input channels", lint="openvino/scale-axis", axis=0, integer=False),
    Case("input with a scale per channel", lint="openvino/activation-scales", per_channel_input=True, integer=False),
    Case("float input, s8 weight", lint="openvino/weight-only", activation="", integer=False),
    Case("rotary", lint="openvino/rotary", rotary=True, refused="RotaryEmbedding"),
)  # fmt: skip


def case_input() -> Array:
    return (3 * np.random.default_rng(1).standard_normal((1, M, K))).astype(np.float32)


def expected(path: Path) -> Array:
    """What the reference evaluator makes of case_input()."""
    result: Array = ReferenceEvaluator(onnx.load(path)).run(None, {"x": case_input()})[0]
    return result


def sqnr_of(path: Path, compiled: Any) -> float:
    """SQNR in dB of OpenVINO's result against the reference evaluator's."""
    return sqnr_db(expected(path), openvino_runtime.run(compiled, {"x": case_input()}, "sample"))


def run_without_vnni(graphs: Sequence[Path], feeds: Mapping[str, Array], folder: Path) -> list[Array]:
    """The value "sample" of each graph where OpenVINO may use no instruction beyond AVX2, in a process of its own."""
    np.savez(folder / "feeds.npz", **feeds)
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from vdq_export.devices import openvino_runtime as runtime\n"
        "feeds = dict(np.load(sys.argv[1]))\n"
        "made = [runtime.run(runtime.compile_graph(Path(p)), feeds, 'sample') for p in sys.argv[3:]]\n"
        "np.savez(sys.argv[2], *made)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "feeds.npz", folder / "results.npz", *graphs],
        env={**ENVIRONMENT, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = np.load(folder / "results.npz")
    return [results[f"arr_{index}"] for index in range(len(graphs))]


def double_weights(graph: Graph) -> Graph:
    """`graph`, edited: every int8 weight and int32 bias times two, their scales halved. It computes the same."""
    for tensor in graph.constants():
        if tensor.name.endswith((".weight.int8", ".bias.int32")):
            tensor.values = (tensor.values * 2).astype(tensor.values.dtype)
        elif tensor.name.endswith((".weight.scale", ".bias.scale")):
            tensor.values = (tensor.values / 2).astype(np.float32)
    return graph
