"""What is kept of what ran ahead, and what it costs in memory."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from vdq_export.graph import Array
from vdq_export.runtime.families import alone
from vdq_export.runtime.memory import Memory, Values
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.tables import Tables

KIB = 1024


class Runs:
    """Counts its runs; each gives `size` bytes, filled with the input's sum."""

    def __init__(self, memory: Memory, size: int = KIB) -> None:
        self.memory, self.size, self.count = memory, size, 0
        self._lock = threading.Lock()

    def __call__(self, value: Array, place: str = "graph") -> Array:
        def run() -> Values:
            with self._lock:
                self.count += 1
            made = np.full(self.size // 4, value.sum(), np.float32)
            return {"y": ort.OrtValue.ortvalue_from_numpy(made)}

        found: Array = self.memory.recall(place, {"x": value}, run)["y"].numpy()
        return found


def number(value: float) -> Array:
    return np.array([value], np.float32)


def test_equal_to_the_last_bit_is_equal() -> None:
    runs = Runs(Memory(most=8, least=8, budget=0))
    for value in (number(1), number(1), number(np.nan), number(np.nan)):
        runs(value)
    assert runs.count == 2
    for other in (number(0), number(-0.0), number(1).astype(np.float64), number(1).reshape(1, 1)):
        runs(other)
    assert runs.count == 6
    runs(number(1), place="another graph")
    assert runs.count == 7
    long = np.zeros(10_000, np.float32)
    runs(long)
    long[-1] = 1  # far behind what is compared first; and the caller's own array
    assert runs(long)[0] == 1
    assert runs.count == 9


def test_views_are_seen_as_what_they_hold() -> None:
    runs = Runs(Memory(most=8, least=8, budget=0))
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    runs(grid[:, ::2])
    runs(grid[:, ::2].copy())
    assert runs.count == 1
    runs(grid[:, 1::2])
    assert runs.count == 2


def test_what_was_used_last_is_kept_within_the_budget() -> None:
    budget = 3 * (KIB + 4)  # results and inputs
    memory = Memory(most=4, least=2, budget=budget)
    runs = Runs(memory)
    for value in (0, 1, 2, 0, 3):
        runs(number(value))
    assert runs.count == 4
    assert memory.nbytes == budget  # four results are over it: 1 went, the one used longest ago
    for value in (2, 3, 0):
        runs(number(value))
    assert runs.count == 4
    runs(number(1))
    assert runs.count == 5


def test_the_least_is_kept_whatever_it_takes_and_the_most_never_exceeded() -> None:
    large = Runs(Memory(most=4, least=2, budget=KIB), size=64 * KIB)
    for value in (0, 1, 0, 1, 0, 1):
        large(number(value))
    assert large.count == 2
    for value in (2, 0, 2, 0):
        large(number(value))
    assert large.count == 4 and large.memory.nbytes < 129 * KIB
    small = Runs(Memory(most=4, least=2, budget=1 << 30))
    for value in (0, 1, 2, 3, 4, 0):
        small(number(value))
    assert small.count == 6


def test_one_run_for_all_threads_and_another_after_a_failure() -> None:
    memory, begun, go = Memory(most=4, least=2, budget=0), threading.Event(), threading.Event()
    counted = []

    def slow(fails: bool) -> Callable[[], Values]:
        def run() -> Values:
            counted.append(1)
            begun.set()
            assert go.wait(10)
            if fails:
                raise RuntimeError("no luck")
            return {}

        return run

    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(memory.recall, "g", {"x": number(1)}, slow(True))
        assert begun.wait(10)
        others = [threads.submit(memory.recall, "g", {"x": number(1)}, slow(True)) for _ in range(2)]
        go.set()
        for one in (first, *others):
            with pytest.raises(RuntimeError, match="no luck"):
                one.result()
    before = len(counted)
    memory.recall("g", {"x": number(1)}, slow(False))
    assert len(counted) == before + 1
    memory.recall("g", {"x": number(1)}, slow(True))
    assert len(counted) == before + 1
    memory.clear()
    assert memory.nbytes == 0


def test_rows_of_tables(tmp_path: Path) -> None:
    wide = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    save_file({"wide": wide, "flat": np.arange(3, dtype=np.int64)}, tmp_path / "t.safetensors")
    tables = Tables(tmp_path / "t.safetensors", (1000.0, 500.0, 0.0))
    assert tables.values == {"wide", "flat"}
    assert [tables.row(t) for t in (1000.0, 500.0004, 500.001, 0.0, 9e-7, 2e-6)] == [0, 1, None, 2, 2, None]
    assert [tables.nearest(t) for t in (2000.0, 750.0, 749.0, -3.0)] == [0, 0, 1, 2]
    row = tables.read("wide", 1)
    np.testing.assert_array_equal(row, wide[1])
    assert row.flags.c_contiguous and tables.read("flat", 2).shape == ()


# -- sessions of graphs that run ahead -------------------------------------------------------------------------------

WIDTH, LAYERS = 1024, 12  # 12 MiB of 8-bit weights, 48 MiB in float
MEMORY = """
import sys
import numpy as np, psutil
from pathlib import Path
from vdq_export.runtime.families import alone
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
(family,) = alone([Path(sys.argv[1])])
x = np.ones((1, 1024), np.float32)
process = psutil.Process()
before = process.memory_info().rss
session = SessionFactory(Backend(), {}, 1, mapped=sys.argv[2] == "mapped")(family)
for _ in range(3):
    session.run(None, {"x": x})
print((process.memory_info().rss - before) / 2**20)
"""


def chain(path: Path) -> list[tuple[Array, Array]]:
    """Write linears of 8-bit weights [WIDTH, WIDTH] in a row, in the order that parts have; (codes, scales) of each."""
    random, weights, nodes, constants, made, x = np.random.default_rng(0), [], [], [], [], "x"
    for layer in range(LAYERS):
        codes = random.integers(-127, 128, (WIDTH, WIDTH), np.int8)
        scales = np.linspace(0.0003, 0.0006, WIDTH, dtype=np.float32)
        constants += [
            onnx.numpy_helper.from_array(codes, f"w{layer}"),
            onnx.numpy_helper.from_array(scales, f"s{layer}"),
        ]
        weights.append(helper.make_node("DequantizeLinear", [f"w{layer}", f"s{layer}"], [f"d{layer}"], axis=1))
        nodes += [
            helper.make_node("MatMul", [x, f"d{layer}"], [f"y{layer}"]),
            helper.make_node("Tanh", [f"y{layer}"], [f"z{layer}"]),
        ]
        x = f"z{layer}"
        made.append((codes, scales))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", x)]
    graph = helper.make_graph([*weights, *nodes], "chain", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return made


def test_weights_stay_in_8_bits_and_inputs_in_float(tmp_path: Path) -> None:
    """onnxruntime's own settings round inputs of 8-bit weights to 8 bits: a hundred times this tolerance."""
    layers = chain(tmp_path / "chain.onnx")
    x = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    expected = x.astype(np.float64)
    for codes, scales in layers:
        expected = np.tanh(expected @ (codes * scales.astype(np.float64)))
    (family,) = alone([tmp_path / "chain.onnx"])
    (found,) = SessionFactory(Backend(), {}, 1, mapped=True)(family).run(None, {"x": x})
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    def added(how: str) -> float:
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "chain.onnx"), how]
        return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert added("mapped") < 40  # the weights' 12 MiB, a layer or two of 4 MiB in float, onnxruntime's own
