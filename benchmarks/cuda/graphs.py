"""The programs kept in benchmarks/cuda/graphs, with random weights.

A kept graph names where each weight lies in a file of its own; that file is written here, integers uniform over their
type, floats normal around what a network of that size has. Never zeros: a GPU multiplies them faster.
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import onnx

GRAPHS = Path(__file__).parent / "graphs"
_BLOCK = 1 << 24  # random numbers that are drawn; larger tensors repeat them


def names() -> list[str]:
    """Of the networks, "wan-1.3b.w8a8" …"""
    return sorted(place.name.removesuffix(".onnx.xz") for place in GRAPHS.glob("*.onnx.xz"))


def materialize(name: str, folder: Path, graphs: Path = GRAPHS) -> Path:
    """The graph `name` as an .onnx file in `folder`, its weights beside it."""
    proto = onnx.ModelProto.FromString(lzma.decompress((graphs / f"{name}.onnx.xz").read_bytes()))
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    normal = random.standard_normal(_BLOCK, np.float32)
    integers = random.integers(-128, 128, _BLOCK, np.int8)
    places: dict[Path, Any] = {}
    try:
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                place = folder / where["location"]
                if place not in places:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    places[place] = place.open("wb")
                places[place].seek(int(where["offset"]))
                places[place].write(_values(tensor, int(where["length"]), normal, integers))
    finally:
        for file in places.values():
            file.close()
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
