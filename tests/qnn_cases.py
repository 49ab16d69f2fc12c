"""A QDQ graph of a few transformer-like blocks for Hexagon, and bundles that hold it."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from tests.quantized_blocks import Builder, layer_norm, linear
from tests.tiny_bundle import bins
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.graph import Array, Graph
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.schedule import Schedule

WIDTH, TOKENS = 64, 16


def blocks(count: int, gain: float = 1.0) -> tuple[ModelProto, dict[str, Array]]:
    """Residual FFN blocks over [1, TOKENS, WIDTH] that all read one value of the timestep. gain: of the latents.

    Weights are the same for every `gain`, ranges are not: two bins of one model.
    """
    make = Builder()
    x = make.input("hidden_states", 1, TOKENS, WIDTH, scale=gain)
    t = make.op("Mul", make.input("timestep", 1, 1, 1), make.constant("embed.by", 0.5), name="embed/Mul")
    for number in range(count):
        name = f"blocks.{number}"
        n = layer_norm(make, x, f"{name}.norm", "uint8")
        n = make.op("Add", n, t, name=f"{name}/Add")
        up = make.op("Gelu", linear(make, n, f"{name}.up", 4 * WIDTH), name=f"{name}/Gelu")
        x = make.op("Add", x, linear(make, up, f"{name}.down", WIDTH), name=f"{name}/Add_1")
    model = make.graph(make.op("Mul", x, make.constant("out.by", 0.25), name="out/Mul")).to_proto()
    return model, make.feeds


def write(out: Path, count: int = 2, *, target: str = "qnn", graphs: tuple[ModelProto, ...] = ()) -> Bundle:
    """A bundle of bins that differ in their ranges; or of `graphs`."""
    made = graphs or tuple(blocks(count, gain)[0] for gain in (1.0, 3.0))
    with BundleWriter(out) as writer:
        chosen = bins(edges=(1000.0, 500.0, 0.0))[: len(made)]
        paths = [
            writer.add_graph(f"body.{one.name}", *Graph.from_proto(model).skeleton())
            for one, model in zip(chosen, made, strict=True)
        ]
        identity = ModelIdentity(name="blocks", weight_hash="0")
        signature = signature_of(made[0], "timestep")
        manifest = Manifest(model=identity, target=target, isa="v75", signature=signature)
        return writer.commit(manifest, Schedule.from_bins(chosen, paths))
