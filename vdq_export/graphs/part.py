"""One part of an ONNX file as a small model of its own, for viewers such as Netron.

Large constants are named, with type and shape, and their data is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx
from onnx import TensorProto

INLINE = 4096  # bytes up to which a constant keeps its data
LEFT_OUT = "data.left.out"


def extract(path: Path, outputs: Collection[str]) -> bytes:
    """The operators of the file that make any of the values `outputs`, between the values that they read and feed."""
    whole = onnx.load(str(path), load_external_data=False)
    graph = whole.graph
    wanted = set(outputs)
    nodes = [node for node in graph.node if wanted & set(node.output)]
    read = {value for node in nodes for value in node.input if value}
    constants = [node for node in graph.node if node.op_type == "Constant" and read & set(node.output)]
    nodes = [*(node for node in constants if node not in nodes), *nodes]
    made = {value for node in nodes for value in node.output if value}
    weights = [_light(tensor) for tensor in graph.initializer if tensor.name in read]
    known = {value.name: value for value in [*graph.input, *graph.value_info, *graph.output]}
    inputs = sorted(read - made - {tensor.name for tensor in weights})
    elsewhere = {value for node in graph.node if node not in nodes for value in node.input}
    ends = [v for node in nodes for v in node.output if v and (v in elsewhere or v not in read)]
    part = onnx.GraphProto(name=graph.name or "part", node=nodes, initializer=weights)
    part.input.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in inputs)
    part.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in dict.fromkeys(ends))
    part.value_info.extend(value for name, value in known.items() if name in made and name not in set(ends))
    model = onnx.ModelProto(ir_version=whole.ir_version, graph=part, producer_name="vdq-export")
    model.opset_import.extend(whole.opset_import)
    model.functions.extend(whole.functions)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _light(tensor: TensorProto) -> TensorProto:
    external = tensor.data_location == TensorProto.EXTERNAL
    if not external and tensor.ByteSize() <= INLINE:
        return tensor
    light = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    light.data_location = TensorProto.EXTERNAL
    light.external_data.add(key="location", value=LEFT_OUT)
    return light
