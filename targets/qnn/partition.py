"""Cuts a QDQ graph at block boundaries into graphs that run one after the other, and chains their compiled contexts.

What crosses a cut is always the integer tensor a QuantizeLinear made, so both sides have its scale and zero point by
construction: the DequantizeLinear of its readers is repeated in each part that reads it.

    part 0:  … Add → QuantizeLinear → [uint16]        part 1:  [uint16] → DequantizeLinear → LayerNormalization …

Works on protos without weight data: the parts refer to the same external data as the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, numpy_helper

from vdq_export.errors import CompileError

# The outermost list of alike modules in a node's path: blocks.7, transformer_blocks.7, single_transformer_blocks.7 …
_BLOCK = re.compile(r"^(?:.*?\.)??(\w*(?:blocks|layers)\.\d+)(?=[./])")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def boundaries(model: ModelProto) -> list[str]:
    """The blocks behind which `model` can be cut, in the order they run: all but the last."""
    return _Cutter(model.graph).blocks[:-1]


def split(model: ModelProto, parts: int) -> list[ModelProto]:
    """`model` as that many graphs with about equal weights, in the order they run. Edits nothing.

    Raises CompileError when it has too few blocks, or when a float value would cross a cut.
    """
    if parts == 1:
        return [model]
    cutter = _Cutter(model.graph)
    if not 1 < parts <= len(cutter.blocks):
        raise CompileError(
            f"{model.graph.name} cannot be cut into {parts} parts", hint=f"it has {len(cutter.blocks)} blocks"
        )
    made = []
    for number, graph in enumerate(cutter.cut(parts)):
        part = ModelProto()
        part.CopyFrom(ModelProto(ir_version=model.ir_version, opset_import=model.opset_import))
        graph.name = f"{model.graph.name}.part{number:02d}"
        part.graph.CopyFrom(graph)
        made.append(part)
    return made


def chain(parts: Sequence[ModelProto], whole: ModelProto) -> tuple[ModelProto, list[str]]:
    """One model that runs the compiled `parts` of `whole` in order, and the tensors handed on between them."""
    outside = {one.name for one in (*whole.graph.input, *whole.graph.output)}
    inner: dict[str, ValueInfoProto] = {}
    made = ModelProto(ir_version=parts[0].ir_version, producer_name=parts[0].producer_name)
    made.opset_import.extend(parts[0].opset_import)
    made.graph.name = whole.graph.name
    made.graph.input.extend(whole.graph.input)
    made.graph.output.extend(whole.graph.output)
    for part in parts:
        made.graph.node.extend(part.graph.node)
        for one in (*part.graph.input, *part.graph.output):
            known = inner.setdefault(one.name, one)
            if known.type.tensor_type != one.type.tensor_type:
                raise CompileError(f"{one.name} has another type behind the cut")
    names = [name for name in inner if name not in outside]
    made.graph.value_info.extend(inner[name] for name in names)
    return made, names


Encoding = tuple[float, int]


def boundary_scales(parts: Sequence[ModelProto]) -> dict[str, list[Encoding]]:
    """{tensor handed on: scale and zero point where it is made, then where it is read, in each part that does}."""
    found: dict[str, list[Encoding]] = {}
    for part in parts:
        constants = {one.name: one for one in part.graph.initializer}
        outside = {one.name for one in (*part.graph.input, *part.graph.output)}
        for node in part.graph.node:
            tensor = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0] if node.input else ""
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and tensor in outside:
                scale, zero = (numpy_helper.to_array(constants[name]).item() for name in node.input[1:3])
                found.setdefault(tensor, []).append((float(scale), int(zero)))
    return {name: encodings for name, encodings in found.items() if len(encodings) > 1}


@dataclass(frozen=True)
class _Needs:
    """What a part takes from elsewhere (in order of first use) and which nodes it runs (indices, in graph order)."""

    inputs: list[str]
    nodes: list[int]


class _Cutter:
    """Which block, and from that which part, every node of a graph belongs to."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.nodes: list[NodeProto] = list(graph.node)
        self.maker = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(index)
        self.constants = {one.name: one for one in graph.initializer}
        self.types = {one.name: one for one in (*graph.value_info, *graph.input, *graph.output)}
        # Blocks in the order in which their last nodes stand: what only reads the timestep may stand far ahead.
        last = {block: index for index, node in enumerate(self.nodes) if (block := _block(node)) is not None}
        self.blocks = sorted(last, key=lambda block: last[block])
        self.stage = self._stages()

    def cut(self, parts: int) -> Iterator[GraphProto]:
        """The parts, each with its inputs, outputs, constants and types."""
        part_of_stage = _even(self._stage_bytes(), parts)
        part = [part_of_stage[stage] for stage in self.stage]
        needs = [self._needs(number, parts, part) for number in range(parts)]
        crossing = {name for one in needs for name in one.inputs if name in self.maker}
        self._check_scales(crossing)
        for number, one in enumerate(needs):
            made = {name for index in one.nodes for name in self.nodes[index].output}
            # A repeated DequantizeLinear makes its value again; it is handed on by nobody.
            own = {name for name in made & crossing if part[self.maker[name]] == number}
            outputs = [o.name for o in self.graph.output if number == parts - 1 or o.name in own]
            outputs += [name for name in self.maker if name in own and name not in outputs]
            yield self._graph(one, outputs)

    def _stages(self) -> list[int]:
        """Of each node the number of its block, or of the latest block it depends on where that is later."""
        number = {block: index for index, block in enumerate(self.blocks)}
        found: list[int] = []
        for node in self.nodes:
            before = [found[self.maker[name]] for name in node.input if name in self.maker]
            block = _block(node)
            found.append(max([*before, 0 if block is None else number[block]]))
        return found

    def _stage_bytes(self) -> list[int]:
        sizes = [1] * max(1, len(self.blocks))
        for index, node in enumerate(self.nodes):
            for name in node.input:
                if name in self.constants:
                    sizes[self._reader_stage(index)] += _bytes(self.constants[name])
        return sizes

    def _reader_stage(self, index: int) -> int:
        """The stage of a node, or for a constant's DequantizeLinear, which depends on nothing, that of its reader."""
        node = self.nodes[index]
        if node.op_type != "DequantizeLinear" or node.input[0] not in self.constants:
            return self.stage[index]
        return min((self.stage[reader] for reader in self.readers.get(node.output[0], ())), default=self.stage[index])

    def _needs(self, number: int, parts: int, part: Sequence[int]) -> _Needs:
        """Everything part `number` computes, DequantizeLinear as often as it is read, and what it takes from others."""
        inputs: dict[str, None] = {}
        chosen: set[int] = set()
        wanted = [i for i, node in enumerate(self.nodes) if part[i] == number and node.op_type != "DequantizeLinear"]
        if number == parts - 1:
            wanted += [self.maker[one.name] for one in self.graph.output]
        while wanted:
            index = wanted.pop()
            if index in chosen:
                continue
            chosen.add(index)
            for name in self.nodes[index].input:
                if not name or name in self.constants:
                    continue
                source = self.maker.get(name)
                if source is None:
                    inputs[name] = None
                elif self.nodes[source].op_type == "DequantizeLinear" or part[source] == number:
                    wanted.append(source)
                else:
                    inputs[name] = None
        return _Needs(sorted(inputs, key=lambda name: self.maker.get(name, -1)), sorted(chosen))

    def _check_scales(self, crossing: set[str]) -> None:
        """What crosses is integer, and is read with the scale and zero point it was made with."""
        for name in sorted(crossing):
            if self.types[name].type.tensor_type.elem_type in _FLOATS:
                raise CompileError(f"{name} would cross a cut in float", hint="every value must be quantized there")
            maker = self.nodes[self.maker[name]]
            if maker.op_type != "QuantizeLinear":
                continue  # an index, a mask …
            for reader in (self.nodes[index] for index in self.readers[name]):
                for one, other in zip(maker.input[1:], reader.input[1:], strict=False):
                    if not self._equal(one, other):
                        raise CompileError(f"{name} is made with {one} and read with {other}")

    def _equal(self, one: str, other: str) -> bool:
        if one == other:
            return True
        arrays = [numpy_helper.to_array(self.constants[name]) for name in (one, other)]
        return bool(np.array_equal(arrays[0], arrays[1]))

    def _graph(self, needs: _Needs, outputs: Sequence[str]) -> GraphProto:
        made = GraphProto()
        nodes = [self.nodes[index] for index in needs.nodes]
        made.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        made.initializer.extend(one for name, one in self.constants.items() if name in used)
        made.input.extend(self.types[name] for name in needs.inputs)
        made.output.extend(self.types[name] for name in outputs)
        inner = {name for node in nodes for name in node.output} - set(outputs)
        made.value_info.extend(one for one in self.graph.value_info if one.name in inner)
        return made


def _block(node: NodeProto) -> str | None:
    """The block in a computing node's module path; Q and DQ follow what they belong to."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return None
    found = _BLOCK.match(node.name)
    return found[1] if found else None


def _even(sizes: Sequence[int], parts: int) -> list[int]:
    """The part of each stage: contiguous, none empty, about equal sums."""
    total, done, part, found = sum(sizes), 0, 0, list[int]()
    for stage, size in enumerate(sizes):
        full = done + size / 2 >= (part + 1) * total / parts
        needed = len(sizes) - stage <= parts - 1 - part  # each stage left must open a part
        if found and part < parts - 1 and (full or needed):
            part += 1
        found.append(part)
        done += size
    return found


def _bytes(tensor: onnx.TensorProto) -> int:
    bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        bits = 4
    return int(prod(tensor.dims)) * bits // 8
