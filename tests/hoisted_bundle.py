"""A bundle small enough to reason about whose graphs are in parts, and the same one with whole graphs.

    y = linear(x) · gain(bin) + text + time + both      text = linear(p) · mask, time = linear(sin(t · f)),
                                                        both = linear(time + mean of text over tokens)

Shapes: G samples the graphs take, x and p [G, 4, 8], t [G], mask [4, 1]. Two experts meet at t = 500.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from tests.graphs import OPSET, WIDTH, Builder
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.graph import Graph
from vdq_export.hoisting import cut as hoisting_cut
from vdq_export.hoisting import split as hoisting
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.plan import Bin, Branch
from vdq_export.policy import CachePolicy, Probe
from vdq_export.schedule import Hoisted, Schedule

EDGES = (1000.0, 750.0, 500.0, 250.0, 0.0)
STEPS = tuple(1000.0 - 125 * step for step in range(8))
SAMPLER = {"name": "flow-euler", "steps": 8, "shift": 1.0, "guidance": 2.0}
ROLES: dict[str, hoisting.Role] = {
    "hidden_states": "latents", "timestep": "timestep", "encoder_hidden_states": "prompt", "mask": "prompt",
}  # fmt: skip


class Kind(NamedTuple):
    """step, tables: which of the two the bundle has for what depends on the timestep alone."""

    hoist: bool = True
    group: int = 1
    branches: tuple[Branch, ...] = ("any",)
    step: bool = True
    tables: bool = True
    rows: tuple[float, ...] = STEPS
    with_probe: bool = False


def graph(index: int, expert: str, group: int = 1) -> onnx.ModelProto:
    """The whole network of one bin."""
    make = Builder(seed=1 if expert == "high" else 2)
    make.param("column", [-1, 1, 1], "int64")
    make.param("tokens", [1], "int64")
    t = make.op("Reshape", "timestep", "column", name="t")
    frequencies = make.param("frequencies", np.exp(-np.arange(WIDTH)).reshape(1, 1, WIDTH))
    time = make.linear(make.op("Sin", make.op("Mul", t, frequencies, name="angles"), name="waves"), "time")
    text = make.op("Mul", make.linear("encoder_hidden_states", "text"), "mask", name="masked")
    pooled = make.op("ReduceMean", text, "tokens", name="pooled")
    both = make.linear(make.op("Add", time, pooled, name="both/Add"), "modulation")
    gain = make.param("gain", 1.0 + 0.5 * index)
    moved = make.op("Mul", make.linear("hidden_states", "latent"), gain, name="scaled")
    make.op("Sum", moved, text, time, both, name="sample")
    return _model(make, "sample", group)


def probe(group: int = 1) -> onnx.ModelProto:
    """latents · time, which the bins are given as "time/Add"; the mask is taken, and adds nothing."""
    make = Builder()
    zero = make.param("zero", 0.0)
    part = make.op("Mul", "hidden_states", "time/Add", name="modulated")
    nothing = make.op("Mul", "mask", zero, name="nothing")
    make.op("Add", part, nothing, name="out")
    model = _model(make, "out", group)
    value = helper.make_tensor_value_info("time/Add", TensorProto.FLOAT, [group, 1, WIDTH])
    model.graph.input.append(value)
    return model


def _model(make: Builder, output: str, group: int) -> onnx.ModelProto:
    read = {name for node in make.nodes for name in node.input}
    shapes = {
        "hidden_states": [group, 4, WIDTH],
        "timestep": [group],
        "encoder_hidden_states": [group, 4, WIDTH],
        "mask": [4, 1],
    }
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items() if n in read]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, [group, 4, WIDTH])]
    made = helper.make_graph(make.nodes, "tiny", inputs, outputs, make.params)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def parts(index: int, expert: str, group: int = 1) -> hoisting.Hoisted:
    """Everything that can move moves."""
    with mock.patch.multiple(hoisting_cut, VALUE=0, CROSSING=0):
        return hoisting.split(Graph.from_proto(graph(index, expert, group)), ROLES)


def write(out: Path, kind: Kind | None = None, **settings: Any) -> Bundle:
    """settings: the schedule's fields."""
    kind = kind or Kind()
    ranges = [(branch, lo, hi) for branch in kind.branches for hi, lo in pairwise(EDGES)]
    with BundleWriter(out) as writer:
        bins, paths = list[Bin](), list[str]()
        for index, (branch, lo, hi) in enumerate(ranges):
            steps = tuple(t for t in STEPS if lo <= t < hi or t == hi == EDGES[0])
            expert = "high" if lo >= 500 else "low"
            bins.append(Bin(index=index, t=(lo, hi), steps=steps, branch=branch, expert=expert))
            number = index % 4
            body = parts(number, expert, kind.group).body.skeleton() if kind.hoist else (
                graph(number, expert, kind.group), {}
            )  # fmt: skip
            paths.append(writer.add_graph(f"body.bin{index:02d}", *body))
        entries = [_write_parts(writer, kind, expert, bins) for expert in ("high", "low")] if kind.hoist else []
        if kind.with_probe:
            high = Probe(graph=writer.add_graph("probe.high", probe(kind.group)), expert="high")
            low = Probe(graph=writer.add_graph("probe.low", probe(kind.group)), expert="low")
            settings = {"reuse": CachePolicy(threshold=0.0, probes=(high, low)), **settings}
        manifest = Manifest(
            model=ModelIdentity(name="hoisted", weight_hash="0"),
            target="test",
            isa="any",
            signature=signature_of(graph(0, "high", kind.group), "timestep"),
        )
        return writer.commit(
            manifest, Schedule.from_bins(bins, paths, **{"sampler": SAMPLER, "hoisted": tuple(entries), **settings})
        )


def _write_parts(writer: BundleWriter, kind: Kind, expert: str, bins: Sequence[Bin]) -> Hoisted:
    made = parts(0, expert, kind.group)
    wanted = {name: one for name, one in made.ahead().items() if name != "step" or kind.step}
    paths = {name: writer.add_graph(f"{name}.{expert}", *one.skeleton()) for name, one in wanted.items()}
    tables = f"tables/{expert}.safetensors" if kind.tables else ""
    if tables:
        assert made.step is not None
        save_file(hoisting.tables(made.step, kind.rows), writer.file(tables))
    return Hoisted(
        bins=tuple(one.index for one in bins if one.expert == expert),
        prompt=paths.get("prompt", ""),
        step=paths.get("step", ""),
        mixed=paths.get("mixed", ""),
        tables=tables,
        timesteps=kind.rows if tables else (),
    )


def inputs(batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Everything but the timestep."""
    random = np.random.default_rng(seed)
    x, p = random.standard_normal((2, batch, 4, WIDTH)).astype(np.float32)
    return {"hidden_states": x, "encoder_hidden_states": p, "mask": np.array([[1], [1], [0.5], [0]], np.float32)}
