"""onnxruntime makes weights float one at a time, in whatever shape linears follow each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graphs import Builder
from vdq_export import ort
from vdq_export.graph import Graph
from vdq_export.weights.order import dequantize_late

WIDTH = 8
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")


def linear(make: Builder, x: str, name: str, width: int = WIDTH, bias: bool = True) -> str:
    """x · W + b of an 8-bit weight, its DequantizeLinear right before it; onnxruntime makes Gemm of both."""
    codes = make.param(f"{name}.weight", make.random.integers(-127, 128, (width, width)), "int8")
    scales = make.param(f"{name}.scale", np.full(width, 0.3 / np.sqrt(width) / 64))
    weight = make.op("DequantizeLinear", codes, scales, name=f"{name}/Weight", axis=1)
    product = make.op("MatMul", x, weight, name=f"{name}/MatMul")
    return make.op("Add", product, make.weight(f"{name}.bias", width), name=f"{name}/Add") if bias else product


def chain(layers: int, width: int = WIDTH) -> onnx.ModelProto:
    """Linears and activations in a row."""
    make, x = Builder(), "x"
    for index in range(layers):
        x = make.op("Tanh", linear(make, x, f"n{index}", width, bias=index % 2 == 1), name=f"n{index}/Tanh")
    return make.model([x], width=width)


def star(layers: int, width: int = WIDTH) -> onnx.ModelProto:
    """Two linears in a row, and `layers` that read what they give, each an output."""
    make = Builder()
    text = make.op("Tanh", linear(make, "x", "first", width), name="first/Tanh")
    text = make.op("Tanh", linear(make, text, "text", width), name="text/Tanh")
    return make.model([linear(make, text, f"n{index}", width) for index in range(layers)], width=width)


def ordered(model: onnx.ModelProto) -> Graph:
    model.ir_version = 10  # onnx writes a newer one than onnxruntime reads
    graph = Graph.from_proto(model)
    dequantize_late(graph)
    return graph


def test_where_they_go() -> None:
    names = [node.name for node in ordered(chain(3)).nodes]
    assert names[:4] == ["n0/Weight", "n1/Weight", "n2/Weight", "n0/MatMul"]
    assert [node.name for node in Graph.from_proto(chain(3)).nodes][:4] != names[:4]


@settings(max_examples=40)
@given(st.data())
def test_nothing_but_the_order_changes(data: st.DataObject) -> None:
    make, values = Builder(data.draw(st.integers(0, 99))), ["x"]
    for index in range(data.draw(st.integers(1, 9))):
        one, two = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
        kind = data.draw(st.sampled_from(["linear", "Add", "Tanh"]))
        if kind == "linear":
            values.append(linear(make, one, f"n{index}"))
        else:
            values.append(make.op(kind, *([one, two] if kind == "Add" else [one]), name=f"n{index}/{kind}"))
    model = make.model([make.op("Identity", values[-1], name="y")])
    model.ir_version = 10
    before, after = Graph.from_proto(model), ordered(model)
    assert sorted(node.name for node in before.nodes) == sorted(node.name for node in after.nodes)
    onnx.checker.check_model(after.to_proto(), full_check=True)
    x = np.random.default_rng(0).standard_normal((1, 4, WIDTH)).astype(np.float32)
    np.testing.assert_array_equal(ort.run(before, {"x": x}, exact=True)["y"], ort.run(after, {"x": x}, exact=True)["y"])
    again = [node.name for node in after.nodes]
    dequantize_late(after)
    assert [node.name for node in after.nodes] == again


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from vdq_export.runtime.families import alone
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
(family,) = alone([Path(sys.argv[1])])
session = SessionFactory(Backend(), {}, 1, mapped=True)(family)
x = np.ones((1, 4, 1024), np.float32)

def told(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = told("VmRSS")
session.run(None, {"x": x})
print(told("VmHWM") - before)
"""


def added(model: onnx.ModelProto, folder: Path, *, late: bool) -> float:
    """MiB that a run adds at its peak, the weights' own pages included."""
    graph = ordered(model) if late else Graph.from_proto(model)
    graph.save(folder / "graph.onnx")
    command = [sys.executable, "-c", MEMORY, str(folder / "graph.onnx")]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@needs_proc
@pytest.mark.parametrize("model", [chain(24, 1024), star(22, 1024)], ids=["chain", "star"])
def test_onnxruntime_holds_one_at_a_time(tmp_path: Path, model: onnx.ModelProto) -> None:
    """24 weights of 1 MiB in 8 bits, 4 MiB in float."""
    assert added(model, tmp_path, late=True) < 40, "96 for all of them at once, beside their own 24"


@needs_proc
def test_where_they_stood_it_holds_all(tmp_path: Path) -> None:
    """The measurement would see them."""
    model = chain(24, 1024)  # every second without a bias
    model.ir_version = 10
    assert added(model, tmp_path, late=False) > 48
