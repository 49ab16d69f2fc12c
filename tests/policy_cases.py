"""Bundles with low and high precision, and a sampler for them: x moves by what the network gives, both branches a step.

The network is tiny_bundle's; precision changes its gain, so that outputs tell which one ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.tiny_bundle import WEIGHT, Array, bins, graph
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.plan import Branch, Precision
from vdq_export.policy import BOTH, CachePolicy, Probe, StaticPolicy
from vdq_export.runtime.transformer import Transformer
from vdq_export.schedule import Schedule

EDGES = (1.0, 0.5, 0.0)
STEPS = tuple(1.0 - step / 10 for step in range(10))  # t is added to the output: it must not drown the rest
OTHER: Array = WEIGHT[::-1].copy()


def probe(group: int = 1) -> onnx.ModelProto:
    """hidden_states · (1 + t): the latent alone, as modulated by t."""
    shape = [group, 4, 64]
    constants = [
        helper.make_tensor("column", TensorProto.INT64, [3], [-1, 1, 1]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
    ]
    nodes = [
        helper.make_node("Reshape", ["timestep", "column"], ["t"]),
        helper.make_node("Add", ["t", "one"], ["scale"]),
        helper.make_node("Mul", ["hidden_states", "scale"], ["modulated"]),
    ]
    inputs = [
        helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [group]),
    ]
    output = helper.make_tensor_value_info("modulated", TensorProto.FLOAT, shape)
    made = helper.make_graph(nodes, "probe", inputs, [output], constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


class Kind(NamedTuple):
    """precisions (): a bundle of one. other_weights: the high graphs share no session with the low ones."""

    precisions: tuple[Precision, ...] = BOTH
    branches: tuple[Branch, ...] = ("any",)
    group: int = 1
    with_probe: bool = True
    other_weights: bool = False


def write(out: Path, kind: Kind | None = None, **settings: Any) -> Bundle:
    """settings: the schedule's fields."""
    kind = kind or Kind()
    made, graphs, names = [], list[str](), list[Precision]()
    with BundleWriter(out) as writer:
        for precision in kind.precisions or ("",):
            for one in bins(kind.branches, EDGES):
                numbered = msgspec.structs.replace(
                    one,
                    index=len(made),
                    steps=tuple(t for t in STEPS if one.t[0] <= t < one.t[1] or t == one.t[1] == EDGES[0]),
                )
                weight = OTHER if kind.other_weights and precision == "high" else WEIGHT
                gain = 0.1 * (1 + 0.3 * one.index) * (1.1 if precision == "high" else 1.0)
                graphs.append(writer.add_graph(f"body.{numbered.name}", *graph(gain, kind.group, weight)))
                made.append(numbered)
                names.append(precision)
        reuse = None
        if kind.with_probe:
            reuse = CachePolicy(threshold=0.0, probes=(Probe(graph=writer.add_graph("probe", probe(kind.group))),))
        chosen: dict[str, Any] = {"policy": StaticPolicy(precision=names[-1]), "reuse": reuse, **settings}
        model, _ = graph(1.0, kind.group)
        manifest = Manifest(
            model=ModelIdentity(name="tiny", weight_hash="0"),
            target="test",
            isa="any",
            signature=signature_of(model, "timestep"),
        )
        return writer.commit(manifest, Schedule.from_bins(made, graphs, precisions=names, **chosen))


def start(seed: int = 0, batch: int = 1) -> tuple[Array, Array]:
    """(x of the first step, context)."""
    random = np.random.default_rng(seed)
    x, context = random.standard_normal((2, batch, 4, 64)).astype(np.float32)
    return x, context


def network(transformer: Transformer, x: Array, t: float, context: Array, branch: Branch | None = None) -> Array:
    """One call."""
    with nullcontext() if branch is None else transformer.cache_context(branch):
        sample: Array = transformer(hidden_states=x, timestep=t, encoder_hidden_states=context).sample
    return sample


def clip(
    transformer: Transformer,
    seed: int = 0,
    *,
    batch: int = 1,
    branches: Sequence[Branch | None] = (None,),
    steps: Sequence[float] = STEPS,
) -> list[Array]:
    """The raw outputs of the first call of each step. The second branch sees no context."""
    x, context = start(seed, batch)
    found = []
    for t in steps:
        outputs = [
            network(transformer, x, t, context if place == 0 else 0 * context, branch)
            for place, branch in enumerate(branches)
        ]
        found.append(outputs[0])
        x = x - np.float32(0.1) * np.mean(outputs, axis=0, dtype=np.float32)
    return found
