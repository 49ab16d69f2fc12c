"""Small graphs, models and records that the calibration tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.graph import Array, Graph
from vdq_export.model import Model, Step
from vdq_export.plan import Rotation, Smoothing
from vdq_export.target_spec import TargetSpec

TOKENS, WIDTH, CONTEXT = 7, 6, 5
SPEC = TargetSpec(
    name="test-int8",
    summary="",
    isa="any",
    activation_dtype={8: "uint8", 6: "uint8", 16: "uint16"},
    weight_dtype={8: "int8", 4: "int4"},
    weight_qmax={8: 127, 4: 7},
    integer=(("uint8", "int8"),),
)


def weights(seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    found = {f"attn.{n}.weight": rng.normal(size=(WIDTH, WIDTH)) for n in ("to_q", "to_k", "to_v", "to_o")}
    found |= {f"attn.{n}.bias": rng.normal(size=WIDTH) for n in ("to_q", "to_k", "to_v", "to_o")}
    found |= {"context.weight": rng.normal(size=(CONTEXT, WIDTH)), "time.weight": rng.normal(size=(1, WIDTH))}
    return {name: array.astype(np.float32) for name, array in found.items()}


def graph(arrays: dict[str, Array] | None = None) -> Graph:
    """One attention layer on h = x·(1 + t/1000), plus a linear over the context and one over the timestep (one row)."""
    arrays = weights() if arrays is None else arrays
    nodes = [
        node("Div", ["timestep", "thousand"], "norm/Div"),
        node("Add", ["norm/Div", "one"], "norm/Add"),
        node("Mul", ["x", "norm/Add"], "norm/Mul"),
    ]
    for name in ("to_q", "to_k", "to_v"):
        nodes += linear(f"attn.{name}", "norm/Mul")
    nodes += [
        node("Transpose", ["attn.to_k/Add"], "attn/Transpose", perm=[0, 2, 1]),
        node("MatMul", ["attn.to_q/Add", "attn/Transpose"], "attn/MatMul"),
        node("Softmax", ["attn/MatMul"], "attn/Softmax", axis=-1),
        node("MatMul", ["attn/Softmax", "attn.to_v/Add"], "attn/MatMul_1"),
        *linear("attn.to_o", "attn/MatMul_1"),
        node("MatMul", ["context", "context.weight"], "context/MatMul"),
        node("ReduceMean", ["context/MatMul", "axes"], "context/ReduceMean"),
        node("Unsqueeze", ["timestep", "zero"], "time/Unsqueeze"),
        node("MatMul", ["time/Unsqueeze", "time.weight"], "time/MatMul"),
        node("Add", ["context/ReduceMean", "time/MatMul"], "out/Add"),
        node("Add", ["attn.to_o/Add", "out/Add"], "out"),
    ]
    constants = {
        **arrays,
        "thousand": np.array([1000.0], np.float32),
        "one": np.array([1.0], np.float32),
        "axes": np.array([1]),
        "zero": np.array([0]),
    }
    made = helper.make_graph(
        nodes,
        "test",
        [value("x", (1, TOKENS, WIDTH)), value("timestep", (1,)), value("context", (1, 3, CONTEXT))],
        [value("out", (1, TOKENS, WIDTH))],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    return Graph.from_proto(onnx.shape_inference.infer_shapes(proto), source="weights-of-the-test")


def node(op: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [name], name=name, **attributes)


def linear(name: str, source: str) -> list[onnx.NodeProto]:
    return [
        node("MatMul", [source, f"{name}.weight"], f"{name}/MatMul"),
        node("Add", [f"{name}/MatMul", f"{name}.bias"], f"{name}/Add"),
    ]


def value(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


class Still(torch.nn.Module):
    """Stands for the network in Model; calibration runs the graph, not this."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return x


def steps(count: int = 6, seed: int = 0, change: Callable[[Step], None] | None = None) -> list[Step]:
    """A trajectory of `count` timesteps, both branches; activations grow as t falls."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Step] = []
    for t in np.linspace(1000, 50, count):
        for branch in ("cond", "uncond"):
            inputs = {
                "x": torch.randn(1, TOKENS, WIDTH, generator=generator) * (1200 - t) / 300,
                "timestep": torch.tensor([float(t)]),
                "context": torch.randn(1, 3, CONTEXT, generator=generator),
            }
            step: Step = {"t": float(t), "branch": branch, "inputs": inputs}  # type: ignore[typeddict-item]
            if change is not None:
                change(step)
            made.append(step)
    return made


def model(trajectories: list[list[Step]] | None = None) -> Model:
    found = [steps(seed=s) for s in range(3)] if trajectories is None else trajectories
    return Model(Still(), dict(found[0][0]["inputs"]) if found else dict(steps(1)[0]["inputs"]), found, name="still")


def hidden(trajectories: list[list[Step]]) -> dict[Slot, Array]:
    """All rows of norm/Mul by slot, from the definition of the graph."""
    found: dict[Slot, list[Array]] = {}
    for step in (s for t in trajectories for s in t):
        x, t = (step["inputs"][n].numpy() for n in ("x", "timestep"))
        found.setdefault(Slot(step["t"], step["branch"]), []).append((x * (t / np.float32(1000) + np.float32(1)))[0])
    return {slot: np.concatenate(rows) for slot, rows in found.items()}


def value_record(rows: Array, name: str = "v", most: int = 32) -> ValueRecord:
    """From all rows [S, tokens, C]; the first `most` of each slot serve as the sample."""
    peak = np.abs(rows).max(axis=1)
    count = np.full(len(rows), rows.shape[1])
    largest = np.argsort(-np.square(rows, dtype=np.float64).sum(axis=2), axis=1)[:, :4]
    top = np.take_along_axis(rows, largest[:, :, None], axis=1)
    lo, hi = rows.min(axis=1), rows.max(axis=1)
    return ValueRecord(name, "linear", ("layer",), lo, hi, count, peak, rows[:, :most], top)


def smoothed(scale: Array) -> Transform:
    """Division by scale [K], nothing else."""
    return Transform(Smoothing(alpha=0.5, scale=tuple(np.asarray(scale, np.float32).tolist()), why="test"))


def rotated(block: int, scale: Array | None = None) -> Transform:
    """A rotation in blocks, and the channel scale after it."""
    after = () if scale is None else tuple(np.asarray(scale, np.float32).tolist())
    return Transform(rotation=Rotation(block=block, scale=after, why="test"))


def record(values: Sequence[ValueRecord], branches: Sequence[Any] = ("cond",)) -> CalibrationRecord:
    """Slots in denoising order; every value must have steps × branches slots."""
    count = len(values[0].lo) // len(branches)
    slots = tuple(Slot(float(t), b) for t in np.linspace(1000, 50, count) for b in branches)
    return CalibrationRecord("test", "m" * 64, "g" * 64, slots, {v.name: v for v in values}, len(slots))
