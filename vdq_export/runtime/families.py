"""Which bins one session can serve: graphs that differ in small constants only are a *family*.

A family's model is its first graph with every constant that differs turned into an input; each bin brings the values to
feed there. All else stays constant, so that onnxruntime fuses and packs as it would for one bin, weights are in memory
once, and going to another bin of the family means feeding other scalars and vectors: nothing is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Family:
    """Bins (ascending) that one session serves.

    graph: the .onnx file of the first; external data is relative to its folder. model: what to load in its place, with
    the constants that differ as inputs; None: the file as it is. constants: of each bin, by input name.
    """

    bins: tuple[int, ...]
    graph: Path
    model: bytes | None
    constants: dict[int, dict[str, Array]]


def alone(graphs: Sequence[Path]) -> list[Family]:
    """Every graph for itself."""
    return [Family((index,), graph, None, {index: {}}) for index, graph in enumerate(graphs)]


def find(graphs: Sequence[Path]) -> list[Family]:
    """The families among the graphs of bins 0, 1, …, in the order of their first bins."""
    members: dict[bytes, list[int]] = {}
    for index, graph in enumerate(graphs):
        members.setdefault(_structure(_read(graph)), []).append(index)
    return [_family(bins, graphs) for bins in members.values()]


def _family(bins: Sequence[int], graphs: Sequence[Path]) -> Family:
    first = graphs[bins[0]]
    if len(bins) == 1:
        return Family(tuple(bins), first, None, {bins[0]: {}})
    every = {index: _small_constants(graphs[index]) for index in bins}
    start = every[bins[0]]
    differing = [name for name in start if len({one[name].tobytes() for one in every.values()}) > 1]
    constants = {index: {name: one[name] for name in differing} for index, one in every.items()}
    return Family(tuple(bins), first, _with_inputs(_read(first), differing), constants)


def _read(graph: Path) -> onnx.ModelProto:
    return onnx.load(graph, load_external_data=False)


def _structure(model: onnx.ModelProto) -> bytes:
    """Hash of everything but the graph's name and the values of small constants. Edits `model`."""
    model.graph.name = ""
    small = _small(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in small]
    shapes = [
        onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims) for tensor in small.values()
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *shapes])
    return hashlib.sha256(model.SerializeToString(deterministic=True)).digest()


def _small(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers that may become inputs.

    Scalars and vectors, since a matrix that is no constant is not packed. No 64-bit integers: these are shapes, axes
    and indices, by which onnxruntime plans. No defaults of inputs that the graph has already.
    """
    inputs = {value.name for value in model.graph.input}
    found = {}
    for tensor in model.graph.initializer:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        vector = sum(size > 1 for size in tensor.dims) <= 1
        if vector and tensor.name not in inputs and dtype.isbuiltin == 1 and dtype.kind in "fiub" and dtype != np.int64:
            found[tensor.name] = tensor
    return found


def _small_constants(graph: Path) -> dict[str, Array]:
    found = {}
    for name, tensor in _small(_read(graph)).items():
        # Checked when the bundle was opened: every reference stays inside the graph's folder.
        found[name] = np.array(onnx.numpy_helper.to_array(tensor, str(graph.parent)))
    return found


def _with_inputs(model: onnx.ModelProto, names: Sequence[str]) -> bytes:
    """`model` with these initializers as inputs. They have no default: a value that is not fed is an error."""
    chosen = set(names)
    kept = []
    for tensor in model.graph.initializer:
        if tensor.name in chosen:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            model.graph.input.append(info)
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    data: bytes = model.SerializeToString()
    return data
