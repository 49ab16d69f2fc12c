"""The float graph that belongs to encodings: a Q/DQ graph without Q and DQ, its constants back in float, on their grid.

    x → Q → DQ → y                      x → y
    x → Q → DQ → Q' → DQ' → y           x → Identity → y      (the Identity's output has the second encoding)
    codes → DQ → y                      scale · (codes − zero_point) → y

Bins differ in the encodings of activations, not in this graph: one serves all that share their weights. Its weights
take four times the bytes of the 8-bit codes (float32), so it is written on demand, never into a bundle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from vdq_export.graph import Array, Graph
from vdq_export.handoff.encodings import Encoding, Quantized, read
from vdq_export.weights.promise import Arrays, Promise
from vdq_export.weights.store import WeightStore


def save(graph: Graph, path: Path) -> None:
    """Write the float graph of the Q/DQ `graph` to `path`, its large constants beside it with the suffix .data.

    Constants are dequantized one at a time, so that the float model is never in memory.
    """
    model, arrays = strip(graph)
    data = path.with_suffix(".data")
    with WeightStore(data, data.name) as store:
        store.externalise(model, arrays)
    path.write_bytes(model.SerializeToString(deterministic=True))


def strip(graph: Graph) -> tuple[onnx.ModelProto, Arrays]:
    """(the float graph with its large constants left out, those constants, computed when asked for)."""
    model, arrays = graph.skeleton()
    found = {one.dequantized: one for one in read(graph)}
    names = {one.dequantized: one.encoding.name for one in found.values()}
    outputs = {value.name for value in model.graph.output}
    for one in found.values():
        if not one.second and one.origin and one.encoding.name in outputs:
            names[one.origin] = one.encoding.name  # the value itself becomes the output
    nodes = [made for node in model.graph.node if (made := _float_node(node, found, names)) is not None]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    quantized = {one.encoding.name: one for one in found.values() if one.codes}
    constants = _constants(model, arrays, quantized)
    used = {name for node in nodes for name in node.input} | outputs
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    kept += [_placeholder(name, constants.held[name].shape) for name in quantized if name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    inside = {name for node in nodes for name in node.output} - outputs
    inner = [info for info in model.graph.value_info if info.name in inside]
    del model.graph.value_info[:]
    model.graph.value_info.extend(inner)
    return model, constants


def weights_key(graph: Graph) -> str:
    """Equal for graphs whose float graphs are equal but for int32 biases, whose grid follows the bin's input scale.

    Constants mapped from one weight store are compared by their place in it, and read only where they are not.
    """
    values, digest = graph.values(), hashlib.sha256()
    for one in read(graph):
        if not one.codes or one.encoding.dtype == "int32":
            continue
        codes = values[one.codes].values
        mapped = isinstance(codes, np.memmap)
        place = f"{codes.filename}@{codes.offset}".encode() if mapped else np.ascontiguousarray(codes).tobytes()
        scale, zero = one.encoding.scale.tobytes(), one.encoding.zero_point.tobytes()
        digest.update(b"|".join([one.dequantized.encode(), place, scale, zero]))
    return digest.hexdigest()


def _constants(model: onnx.ModelProto, arrays: Arrays, quantized: Mapping[str, Quantized]) -> Arrays:
    """Arrays of the float graph by name; quantized ones are dequantized when they are read."""
    inline = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in arrays}
    codes = {one.codes for one in quantized.values()}
    held: dict[str, Any] = {name: values for name, values in arrays.held.items() if name not in codes}
    for name, one in quantized.items():
        given = arrays.held.get(one.codes)
        source = onnx.numpy_helper.to_array(inline[one.codes]) if given is None else given
        held[name] = Promise(source, partial(dequantize, encoding=one.encoding), dtype=np.float32)
    return Arrays(held)


def dequantize(codes: Array, encoding: Encoding) -> Array:
    """float32 values of integer `codes`, rounded once as DequantizeLinear does."""
    scale, zero = (_spread(values, codes.shape, encoding) for values in (encoding.scale, encoding.zero_point))
    found: Array = (codes.astype(np.int32) - zero.astype(np.int32)).astype(np.float32) * scale.astype(np.float32)
    return found


def _spread(values: Array, shape: tuple[int, ...], encoding: Encoding) -> Array:
    """Per-channel and per-block parameters in a form that broadcasts against the tensor."""
    if encoding.axis is None:
        return values
    if encoding.block:
        return np.repeat(values, encoding.block, axis=encoding.axis)
    return values.reshape([-1 if axis == encoding.axis else 1 for axis in range(len(shape))])


def _float_node(
    node: onnx.NodeProto, found: Mapping[str, Quantized], names: Mapping[str, str]
) -> onnx.NodeProto | None:
    if node.op_type == "QuantizeLinear":
        return None
    if node.op_type == "DequantizeLinear":
        one = found[node.output[0]]
        if not one.second:
            return None
        source = names.get(one.origin, one.origin)
        return onnx.helper.make_node("Identity", [source], [one.encoding.name], name=f"{node.name}/Convert")
    kept = onnx.NodeProto()
    kept.CopyFrom(node)
    kept.input[:] = [names.get(name, name) for name in node.input]
    kept.output[:] = [names.get(name, name) for name in node.output]
    return kept


def _placeholder(name: str, shape: tuple[int, ...]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=shape, data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="unset")
    return tensor
