"""What a graph of a bundle takes at one recorded step: the model's inputs, and what was hoisted out of the graph."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import onnx

from vdq_export.bundle import Bundle
from vdq_export.graph import Array
from vdq_export.model import Step
from vdq_export.runtime.ahead import Ahead


def bin_feeds(bundle: Bundle, index: int, step: Step, graph: Path | None = None) -> dict[str, Array]:
    """Inputs of the graph of bin `index`; graph: of another file that takes the same place."""
    taken = [one.name for one in onnx.load(graph or bundle.graph_path(index), load_external_data=False).graph.input]
    inputs = {name: tensor.numpy() for name, tensor in step["inputs"].items()}
    with closing(Ahead(bundle)) as ahead:
        found = ahead.feeds(index, taken, inputs)
        return {name: value if hasattr(value, "reshape") else value.numpy() for name, value in found.items()}
