"""Golden graphs: `python -m tests.goldens` writes tests/goldens/NAME.txt anew. Few, tiny, weights left out.

To add one: a function that builds a graph, named in GOLDENS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from tests.graphs import quantized_linear, transformer
from vdq_export.graph_view import from_proto
from vdq_export.normal_form import normal_form

FOLDER = Path(__file__).parent / "goldens"
GOLDENS: dict[str, Callable[[], onnx.ModelProto]] = {
    "transformer-1-block": lambda: transformer(1),
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
