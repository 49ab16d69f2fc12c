"""What a step cannot be faster than, and what is expected of it: counted from the kept graphs, kernel by kernel.

`python -m benchmarks.cuda.floors` needs no GPU. Each program is lowered to tensors without values; every call of it
says which bytes it reads and writes and how many operations it does. It writes the tables of benchmarks/cuda.md and
benchmarks/results/cuda-memory.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from benchmarks import common
from benchmarks.cuda import graphs
from benchmarks.cuda.linears import GOALS, LARGE, ROWS, SHAPES
from vdq_export.targets.cuda import fused_ops
from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.program import Program

NOTES = Path(__file__).parent.parent / "cuda.md"
# H200, NVIDIA's data sheet, dense: operations and bytes a second.
PEAK_8, PEAK_16, BANDWIDTH = 1979e12, 989.5e12, 4.8e12
# What is expected of them; reasons in cuda.md.
COPY = 4.3e12  # bytes a second of a copy on an H200
L2 = 6.5e12  # bytes a second that tiles of a product read
BF16_LINEAR, BF16_ATTENTION = 700e12, 650e12  # operations a second: cuBLAS; the best of torch's attentions
SCORE_16, SCORE_FP8 = 6.5e-3 / 1.29e10, 7e-3 / 1.29e10  # seconds a score of 128 channels: attention_int8.py
SHOWN = 5e-5  # seconds of a step: kernels that take less stand in one line
REST = 3.0  # compiled bfloat16 moves so many times the bytes of our norms, rotations and quantizers
_VIEWS = (
    "getitem", "row", "pick", "view", "reshape", "transpose", "vector", "table", "split", "quantizer", "squeeze",
    "unsqueeze", "slice", "permute",
)  # fmt: skip


@dataclass
class Calls:
    """All calls of one kernel at one shape. floor, expected: seconds; bf16: what compiled bfloat16 should take."""

    kernel: str
    shape: str
    bytes: float
    operations: float = 0.0
    floor: float = 0.0
    expected: float = 0.0
    bf16: float = 0.0
    count: int = 1

    def add(self, other: Calls) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_SUMS = ("bytes", "operations", "floor", "expected", "bf16", "count")


class _Counting(fx.Interpreter):
    """Runs a program on the device "meta" and writes its calls down."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self.calls: dict[tuple[str, str], Calls] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n.op in ("call_function", "call_method"):
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
            given = self.fetch_args_kwargs_from_env(n)
            call = _call(name, n.target, given, found)
            if call is not None:
                kept = self.calls.setdefault((call.kernel, call.shape), call)
                if kept is not call:
                    kept.add(call)
        return found


def _call(name: str, target: Any, given: tuple[Any, dict[str, Any]], found: Any) -> Calls | None:
    named = given[1]
    moved = _bytes(given) + _bytes(found)
    if target is fused_ops.linear:
        return _linear(named, moved)
    if target is fused_ops.attention:
        return _attention(named, moved)
    if target in (fused_ops.normalize, fused_ops.rope):
        return _moving(name, _shape(named["x"]), moved, REST)
    if any(name.startswith(one) for one in _VIEWS) or not moved:
        return None
    shape = _shape(next(one for one in _pytree.tree_leaves(found) if isinstance(one, Tensor)))
    return _moving(f"torch {name}", shape, moved, 1.0)


def _moving(kernel: str, shape: str, moved: float, times: float) -> Calls:
    """Of a kernel that only moves bytes; bfloat16 moves so many times as many."""
    return Calls(kernel, shape, moved, 0.0, moved / BANDWIDTH, moved / COPY, times * moved / COPY)


def _linear(named: dict[str, Any], moved: float) -> Calls:
    weight, x = named["weight"], named["x"]
    m, k, n = x.numel() // x.shape[-1], weight.k, weight.n
    operations, codes = 2.0 * m * n * k, named.get("x_scale") is not None
    kernel, peak = f"linear_{weight.kind}" if codes else "linear_weight_only", PEAK_8 if codes else PEAK_16
    expected = max(linear_seconds(kernel, m, n, k, weight.group, operations, peak), moved / COPY)
    floor = max(moved / BANDWIDTH, operations / peak)
    return Calls(kernel, f"{m} × {k} × {n}", moved, operations, floor, expected, operations / BF16_LINEAR)


def linear_seconds(kernel: str, m: int, n: int, k: int, group: int, operations: float, peak: float) -> float:
    """What the tiles read of the L2 cache, by the table of sm_90; sums of groups are converted besides."""
    kinds: dict[str, object] = {"group": group, "low": False, "x": "float16"}
    tile = _config.rule("sm_90", kernel, {"m": m, "n": n, "k": k}, kinds)
    size = {"linear_int4": 0.5, "linear_weight_only": 1.0}.get(kernel, 1.0)
    rows = 2.0 if kernel == "linear_weight_only" else 1.0
    read = float(m) * n * k * (rows / tile["BLOCK_N"] + size / tile["BLOCK_M"])
    return max(operations / peak, read / L2) + (operations / peak * 64 / group if group else 0.0)


def _attention(named: dict[str, Any], moved: float) -> Calls:
    q, k, heads = named["q"], named["k"], named["heads"]
    width = q.shape[2] // heads
    scores = float(q.shape[0]) * heads * q.shape[1] * k.shape[1]
    operations = 4 * scores * width
    bf16 = max(operations / BF16_ATTENTION, moved / COPY)
    shape = f"{heads} × {q.shape[1]} × {k.shape[1]} × {width}"
    least = moved / BANDWIDTH
    if named.get("q_scale") is None:
        return Calls("attention, torch", shape, moved, operations, max(least, operations / PEAK_16), bf16, bf16)
    eight = named.get("v_scale") is not None
    floor = max(least, operations / 2 / PEAK_8 + operations / 2 / (PEAK_8 if eight else PEAK_16))
    each = (SCORE_FP8 if eight else SCORE_16) * max(1.0, width / 128)
    kernel = f"attention_int8, v in {'FP8' if eight else '16 bits'}"
    return Calls(kernel, shape, moved, operations, floor, max(each * scores, moved / COPY), bf16)


def _bytes(values: Any) -> float:
    return float(sum(getattr(one, "nbytes", 0) for one in _pytree.tree_leaves(values)))


def _shape(x: Tensor) -> str:
    return " × ".join(map(str, x.shape))


def calls_of(program: Program) -> list[Calls]:
    """The kernels of one step, the longest first."""
    counting = _Counting(program)
    with torch.no_grad():
        counting.run(*[torch.empty(one.shape, dtype=one.dtype, device="meta") for one in program.inputs])
    return sorted(counting.calls.values(), key=lambda one: -one.expected)


def without_values(name: str, place: Path = graphs.GRAPHS) -> Program:
    """A kept program on the device "meta"."""
    with TemporaryDirectory() as folder:
        return lower(graphs.materialize(name, Path(folder), place, values=False), device="meta", dtype=torch.float16)


def step_table(name: str, calls: Sequence[Calls]) -> common.Table:
    rows, small, whole = [], Calls("others", "", 0.0, count=0), Calls("**all**", "", 0.0, count=0)
    for one in calls:
        whole.add(one)
        if one.expected >= SHOWN:
            rows.append(_row(one))
        else:
            small.add(one)
    rows += [_row(small), _row(whole)]
    heads = ("kernel", "shape", "calls", "GB", "10¹² operations", "floor ms", "expected ms", "bf16 expected ms",
             "measured ms")  # fmt: skip
    ratios = f"{whole.bf16 / whole.floor:.2f} times bfloat16 at the floor, {whole.bf16 / whole.expected:.2f} expected"
    return f"{name}: {ratios}", heads, rows


def _row(one: Calls) -> list[str]:
    numbers = (f"{one.bytes / 1e9:.2f}", f"{one.operations / 1e12:.2f}")
    return [one.kernel, one.shape, str(one.count), *numbers, _ms(one.floor), _ms(one.expected), _ms(one.bf16), ""]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def linear_table() -> common.Table:
    """The INT8 linears of linears.py, the quantization of their input included."""
    rows = []
    for k, n in SHAPES:
        operations = 2.0 * ROWS * k * n
        quantize, written = 3.0 * ROWS * k, ROWS * k + k * n + 2.0 * ROWS * n
        floor = max(operations / PEAK_8, written / BANDWIDTH) + quantize / BANDWIDTH
        product = max(linear_seconds("linear_int8", ROWS, n, k, 0, operations, PEAK_8), written / COPY)
        expected, bf16 = product + quantize / COPY, operations / BF16_LINEAR
        rows.append([
            f"{k} × {n}", _ms(floor), _ms(expected), _ms(bf16), f"{bf16 / floor:.2f}", f"{bf16 / expected:.2f}",
            f"≥ {GOALS[k * n >= LARGE]}", "",
        ])  # fmt: skip
    heads = (
        "K × N",
        "floor ms",
        "expected ms",
        "bf16 expected ms",
        "× at the floor",
        "× expected",
        "goal",
        "measured ×",
    )
    return f"INT8 linear with the quantization of its input, M = {ROWS}", heads, rows


def memory_table(programs: Sequence[tuple[str, Program]]) -> common.Table:
    """Weights of a step's program against the same parameters in two bytes each."""
    rows = []
    for name, program in programs:
        parameters, quantized, tables = _parameters(program)
        own = program.weight_bytes - tables
        rows.append([
            name, f"{parameters / 1e6:.1f}", f"{2 * parameters / 1e6:.1f}", f"{own / 1e6:.1f}",
            f"{2 * parameters / own:.3f}", f"{quantized:.3f}", "≥ 3.6" if ".w4" in name else "≥ 1.95",
            f"{tables / 1e6:.1f}",
        ])  # fmt: skip
    heads = ("program", "10⁶ parameters", "bf16 MB", "weights MB", "× smaller", "× smaller, quantized layers", "goal",
             "rotary tables and bins, MB")  # fmt: skip
    return "Weights of a step", heads, rows


def _parameters(program: Program) -> tuple[int, float, int]:
    """(parameters of the network in the program; bytes of its quantized layers in bfloat16 over theirs here; bytes of
    what is no parameter: tables of angles, bins)"""
    parameters = tables = 0
    plain = packed = 0
    for held in {id(one): one for one in program.module.__dict__.values() if not isinstance(one, Tensor)}.values():
        if hasattr(held, "nbytes") and hasattr(held, "kind"):
            parameters, plain, packed = parameters + held.k * held.n, plain + 2 * held.k * held.n, packed + held.nbytes
    for name, held in program.module.named_buffers():
        if re.search(r"Rotary|rope|bins$|angles|\bcos|\bsin", name):
            tables += held.nbytes
        elif held.is_floating_point():
            parameters += held.numel()
        else:
            tables += held.nbytes
    return parameters, plain / packed if packed else 0.0, tables


def write_notes(tables: Sequence[common.Table], notes: Path = NOTES) -> None:
    """The tables, between the marks of the notes."""
    text = "\n".join(common.markdown(*one).replace("## ", "### ", 1) for one in tables)
    before, _, rest = notes.read_text(encoding="utf-8").partition("<!-- floors -->\n")
    _, mark, after = rest.partition("<!-- end of floors -->")
    if not mark:
        raise ValueError(f"{notes} has no marks for the tables")
    notes.write_text(f"{before}<!-- floors -->\n{text}{mark}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Count the floors of the kept programs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.floors", description=main.__doc__)
    parser.add_argument("--print", action="store_true", help="Print the tables and write nothing.")
    chosen = parser.parse_args(arguments)
    programs = list(_programs())
    tables = [linear_table(), *(step_table(name, calls_of(program)) for name, program in programs)]
    memory = memory_table(programs)
    for one in (*tables, memory):
        print(common.markdown(*one))
    if not chosen.print:
        write_notes(tables)
        common.write("cuda-memory", "The CUDA target: weights", [memory], {"tables": [memory]}, MEMORY, small=False,
                     module="cuda.floors")  # fmt: skip


def _programs() -> Iterator[tuple[str, Program]]:
    for name in graphs.names():
        yield name, without_values(name)


MEMORY = (
    "Counted, on no GPU, from the programs in benchmarks/cuda/graphs: bytes of the buffers that a step's program holds "
    "on the device, scales and column sums included, against two bytes for each parameter of the network in it. What "
    "no step changes (text projections, keys and values of the prompt) runs ahead and is not in it. Tables of rotary "
    "angles belong to the shape of the video, not to the weights. Groups of 128 in w4a8."
)


if __name__ == "__main__":
    main()
