"""A bundle small enough to reason about: y = (x · W) · gain(bin) + t + context, W shared by every bin's graph.

Shapes: G samples the graphs take, x[G, 4, 64], t[G], context[G, 4, 64], W[64, 64].
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.plan import Bin, Branch
from vdq_export.schedule import Schedule

Array = np.ndarray[Any, Any]
WEIGHT: Array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
EDGES = (1000.0, 750.0, 500.0, 250.0, 0.0)


def graph(gain: float, group: int = 1, weight: Array = WEIGHT) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """(model whose W is a placeholder, {"W": data})."""
    hidden, n = weight.shape
    floats = TensorProto.FLOAT
    placeholder = TensorProto(name="W", dims=weight.shape, data_type=floats, data_location=TensorProto.EXTERNAL)
    placeholder.external_data.add(key="location", value="unset")
    constants = [
        helper.make_tensor("gain", floats, [], [gain]),
        helper.make_tensor("column", TensorProto.INT64, [3], [-1, 1, 1]),
    ]
    nodes = [
        helper.make_node("MatMul", ["hidden_states", "W"], ["product"]),
        helper.make_node("Mul", ["product", "gain"], ["scaled"]),
        helper.make_node("Reshape", ["timestep", "column"], ["t"]),
        helper.make_node("Add", ["scaled", "t"], ["shifted"]),
        helper.make_node("Add", ["shifted", "encoder_hidden_states"], ["sample"]),
    ]
    inputs = [
        helper.make_tensor_value_info("hidden_states", floats, [group, 4, hidden]),
        helper.make_tensor_value_info("timestep", floats, [group]),
        helper.make_tensor_value_info("encoder_hidden_states", floats, [group, 4, n]),
    ]
    outputs = [helper.make_tensor_value_info("sample", floats, [group, 4, n])]
    made = helper.make_graph(nodes, f"gain{gain}", inputs, outputs, [placeholder, *constants])
    opset = [helper.make_opsetid("", 21)]
    return helper.make_model(made, opset_imports=opset, ir_version=10, producer_name="test"), {"W": weight}


def bins(branches: tuple[Branch, ...] = ("any",), edges: tuple[float, ...] = EDGES) -> list[Bin]:
    """Bins between descending edges, for each branch."""
    ranges = [(branch, lo, hi) for branch in branches for hi, lo in pairwise(edges)]
    return [
        Bin(index=i, t=(lo, hi), steps=((lo + hi) / 2,), branch=branch) for i, (branch, lo, hi) in enumerate(ranges)
    ]


def gain(index: int) -> float:
    return 2.0**index


def fill(
    writer: BundleWriter,
    group: int = 1,
    branches: tuple[Branch, ...] = ("any",),
    weight: Array = WEIGHT,
    edges: tuple[float, ...] = EDGES,
) -> Bundle:
    """Write graphs, schedule and manifest into an open writer and commit."""
    made = bins(branches, edges)
    paths = [writer.add_graph(f"body.{one.name}", *graph(gain(one.index), group, weight)) for one in made]
    model, _ = graph(1.0, group, weight)
    identity = ModelIdentity(name="tiny", weight_hash="0", config={"patch_size": [1, 2, 2], "in_channels": 4})
    manifest = Manifest(model=identity, target="test", isa="any", signature=signature_of(model, "timestep"))
    return writer.commit(manifest, Schedule.from_bins(made, paths, sampler={"name": "euler", "steps": 4}))


def write(out: Path, *, force: bool = False, **kind: Any) -> Bundle:
    with BundleWriter(out, force=force) as writer:
        return fill(writer, **kind)


def expected(x: Array, t: Array, context: Array, indices: list[int]) -> Array:
    """What the bundle computes for samples [B, …] that fall into the bins `indices`."""
    gains = np.array([gain(index) for index in indices], np.float32).reshape(-1, 1, 1)
    result: Array = (x @ WEIGHT) * gains + t.reshape(-1, 1, 1) + context
    return result


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
