"""Golden graphs: `python -m tests.goldens` writes tests/goldens/NAME.txt anew. Few, tiny, weights left out.

To add one: a function that builds a graph, named in GOLDENS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from tests.graphs import quantized_linear, transformer
from tests.smoothing_cases import plan_for, with_scale
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.graphs.normal_form import normal_form
from vdq_export.graphs.view import from_proto


def quantized_transformer(order: tuple[str, ...]) -> onnx.ModelProto:
    """One block through the passes named in `order`, with a plan of fixed smoothing, scales and zero points."""
    graph = Graph.from_proto(transformer(1))
    plan = plan_for(graph)
    for layer in plan.layers:
        assert layer.smoothing is not None
        # Rounded: names carry a digest of the scales, and exp() may differ in its last bit between machines.
        plan = with_scale(plan, layer.name, tuple(round(s, 3) for s in layer.smoothing.scale))
    pipeline.run_passes(graph, order, PassContext(plan, plan.bins[0]))
    return graph.to_proto()


FOLDER = Path(__file__).parent / "goldens"
GOLDENS: dict[str, Callable[[], onnx.ModelProto]] = {
    "transformer-1-block": lambda: transformer(1),
    "transformer-1-block-smoothed": lambda: quantized_transformer(pipeline.FLOAT),
    "transformer-1-block-int8": lambda: quantized_transformer((*pipeline.FLOAT, *pipeline.SHARED, *pipeline.PER_BIN)),
    "quantized-linear": quantized_linear,
}


def current(name: str) -> str:
    """What the golden would be now."""
    return normal_form(from_proto(GOLDENS[name](), name))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for stale in {path.stem for path in FOLDER.glob("*.txt")} - GOLDENS.keys():
        (FOLDER / f"{stale}.txt").unlink()
    for name in GOLDENS:
        (FOLDER / f"{name}.txt").write_bytes(current(name).encode())


if __name__ == "__main__":
    main()
