"""The programs kept in benchmarks/cuda/graphs, with random weights.

A kept graph names where each weight lies in a file of its own; that file is written here, integers uniform over their
type, floats normal around what a network of that size has. Never zeros: a GPU multiplies them faster.
"""

from __future__ import annotations

import lzma
from contextlib import ExitStack
from os import SEEK_END
from pathlib import Path
from typing import Any

import numpy as np
import onnx

GRAPHS = Path(__file__).parent / "graphs"
_BLOCK = 1 << 24  # random numbers that are drawn; larger tensors repeat them


def names() -> list[str]:
    """Of the networks, "wan-1.3b.w8a8" …"""
    return sorted(place.name.removesuffix(".onnx.xz") for place in GRAPHS.glob("*.onnx.xz"))


def load(name: str, graphs: Path = GRAPHS) -> onnx.ModelProto:
    """The graph `name`, without what lies in its files."""
    return onnx.ModelProto.FromString(lzma.decompress((graphs / f"{name}.onnx.xz").read_bytes()))


def materialize(name: str, folder: Path, graphs: Path = GRAPHS, *, values: bool = True) -> Path:
    """The graph `name` as an .onnx file in `folder`, its weights beside it.

    values: without, files as long as they should be that hold nothing, for who asks for shapes alone.
    """
    proto = load(name, graphs)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    normal = random.standard_normal(_BLOCK if values else 1, np.float32)
    integers = random.integers(-128, 128, _BLOCK if values else 1, np.int8)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for tensor in proto.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            where = {entry.key: entry.value for entry in tensor.external_data}
            place, start, length = folder / where["location"], int(where["offset"]), int(where["length"])
            if place not in files:
                place.parent.mkdir(parents=True, exist_ok=True)
                files[place] = stack.enter_context(place.open("wb"))
            file = files[place]
            if values:
                file.seek(start)
                file.write(_values(tensor, length, normal, integers))
            else:
                file.truncate(max(file.seek(0, SEEK_END), start + length))
    out = folder / f"{name}.onnx"
    out.write_bytes(proto.SerializeToString())
    return out


def _values(tensor: onnx.TensorProto, length: int, normal: Any, integers: Any) -> bytes:
    """`length` bytes of the tensor's type: scales positive, matrices 1/√K, gains and the like around 1."""
    if tensor.data_type != onnx.TensorProto.FLOAT:
        return _repeated(integers, length).tobytes()
    values = _repeated(normal, length // 4)
    if tensor.name.endswith(".scale"):
        return (1e-3 + 1e-4 * np.abs(values)).astype(np.float32).tobytes()
    width = max(tensor.dims, default=1)
    return (values / np.float32(width) ** 0.5).astype(np.float32).tobytes()


def _repeated(source: Any, count: int) -> Any:
    return np.resize(source, count)
