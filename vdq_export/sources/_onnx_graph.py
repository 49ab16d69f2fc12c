"""Somebody else's .onnx file as a float graph of ours: checked, static, at our opset, named by modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnxscript import version_converter
from onnxscript.optimizer import fold_constants

from vdq_export.errors import ModelError
from vdq_export.graph import INLINE_BYTES, OUTPUT, Array, Graph
from vdq_export.sources import _onnx_names
from vdq_export.tracing.exporter import OPSET, left_out

OLDEST, NEWEST = 18, 23  # opsets that convert to ours
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "MatMulInteger")
_FOLDED_BYTES = 2**20  # constants up to this size are computed ahead: shapes, masks and tables, no weights
Signatures = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


@dataclass(frozen=True)
class File:
    """A file's graph; output: what the file itself calls the network's output; notes: what was changed."""

    graph: Graph
    output: str
    opset: int
    notes: tuple[str, ...]


def read(path: Path, recorded: Signatures) -> File:
    """The graph with the input shapes of the recorded steps. Raises ModelError for whatever does not fit."""
    model, opset = _load(path)
    _check_ops(model, path)
    notes = _fix_inputs(model.graph, recorded, path)
    if len(model.graph.outputs) != 1:
        names = ", ".join(str(one.name) for one in model.graph.outputs)
        raise ModelError(f"{path} has {len(model.graph.outputs)} outputs: {names}", hint="export the latent's alone")
    output = str(model.graph.outputs[0].name)
    _tidy(model, opset, path)
    _onnx_names.apply(model)
    _name_output(model)
    arrays = _take_weights(model)
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: shapes do not agree with the recorded steps: {why}", hint="record again") from error
    graph = Graph.from_proto(proto, arrays)
    graph.cleanup()
    _check_static(graph, path)
    return File(graph, output, opset, tuple(notes))


def _load(path: Path) -> tuple[ir.Model, int]:
    """(model with its external data mapped, opset of the standard operators)."""
    try:
        proto = onnx.load(path, load_external_data=False)
        _check_external(proto, path)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except ModelError:
        raise
    except Exception as error:  # protobuf and onnx_ir raise their own
        raise ModelError(f"{path} is no ONNX model: {' '.join(str(error).split())[:200]}", hint="export it") from error
    opset = model.opset_imports.get("", 0)
    if not list(model.graph):
        raise ModelError(f"{path} is no ONNX model: it has no operators", hint="export it again")
    if not OLDEST <= opset <= NEWEST:
        raise ModelError(f"{path} is of opset {opset}", hint=f"export it at opset {OLDEST} to {NEWEST}, best {OPSET}")
    return model, opset


def _check_external(proto: onnx.ModelProto, path: Path) -> None:
    """Every file that holds weights is beside the model, and long enough."""
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {one.key: one.value for one in tensor.external_data}
        place = path.parent / entry.get("location", "")
        if path.parent.resolve() not in place.resolve().parents:
            raise ModelError(f"{path}: {tensor.name} is outside the model's folder: {place}", hint="export it again")
        if not place.is_file():
            raise ModelError(
                f"{place} is missing, in which {path.name} has its weights", hint="put it beside the model"
            )
        end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        if end > place.stat().st_size:
            raise ModelError(f"{place} is cut short: {tensor.name} ends at byte {end}", hint="fetch it again")


def _check_ops(model: ir.Model, path: Path) -> None:
    for node in model.graph.all_nodes():
        if node.op_type in _QUANTIZED:
            raise ModelError(f"{path} is quantized already ({node.op_type} {node.name})", hint="give the float graph")
        known = onnx.defs.has(node.op_type, OPSET, "") or (node.domain, node.op_type, node.overload) in model.functions
        if node.domain in ("", "ai.onnx") and not known:
            raise ModelError(
                f"{path}: operator {node.op_type} does not exist at opset {OPSET}", hint=f"export it at opset {OPSET}"
            )
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise ModelError(
                f"{path}: {node.op_type} {node.name} depends on data", hint="export a graph without branches"
            )
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and value.const_value.dtype in _HALF and value.const_value.size > 1:
            raise ModelError(f"{path}: weight {name} is in half precision", hint="export the float32 network")


def _fix_inputs(graph: ir.Graph, recorded: Signatures, path: Path) -> list[str]:
    """Give every input the recorded shape. Raises ModelError for inputs that differ from the recorded ones."""
    inputs = {str(one.name): one for one in graph.inputs if one.name not in graph.initializers}
    if odd := sorted(inputs.keys() ^ recorded.keys()):
        where = "the recorded steps have no" if odd[0] in inputs else f"{path} has no"
        raise ModelError(f"{where} input {odd[0]!r}", hint=f"{path.name} takes {', '.join(inputs)}: record just these")
    notes = []
    for name, value in inputs.items():
        (shape, dtype), free = recorded[name], []
        declared = value.shape if value.shape is not None else ir.Shape([None] * len(shape))
        kind = value.dtype.numpy() if value.dtype is not None else None
        fits = len(declared) == len(shape) and all(
            not isinstance(one, int) or one == size for one, size in zip(declared, shape, strict=True)
        )
        if not fits or kind != dtype:
            raise ModelError(
                f"{path} takes {name} as {list(map(str, declared))} {kind}, recorded is {list(shape)} {dtype}",
                hint="record with the network that was exported",
            )
        free = [str(one) for one in declared if not isinstance(one, int)]
        if free:
            notes.append(f"{path.name}: {name} has free dimensions; they become the recorded {list(shape)}")
            value.shape = ir.Shape(shape)
    return notes


def _tidy(model: ir.Model, opset: int, path: Path) -> None:
    """Our opset; functions inlined; constants computed; every constant an initializer."""
    try:
        ir_passes.InlinePass()(model)
        if opset < OPSET:
            version_converter.convert_version(model, OPSET)
        model.opset_imports[""] = OPSET  # newer: _check_ops knows that every operator existed then
        for value in [v for node in model.graph for v in node.outputs]:
            if value not in model.graph.outputs:
                value.shape = None  # of the free dimensions; inferred again
        model.graph.outputs[0].shape = None
        fold_constants(model, onnx_shape_inference=True, should_fold=lambda node: None if _is_small(node) else False)
    except Exception as error:  # whatever the converters raise
        why = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: opset {opset} does not convert to {OPSET}: {why}", hint=f"export it at opset {OPSET}"
        ) from error
    for step in (
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True),
        ir_passes.IdentityEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
    ):
        step(model)


def _is_small(node: ir.Node) -> bool:
    return all(v is None or v.const_value is None or v.const_value.nbytes <= _FOLDED_BYTES for v in node.inputs)


def _name_output(model: ir.Model) -> None:
    """The network's output gets the name that all graphs here have."""
    output = model.graph.outputs[0]
    for node in model.graph:
        for value in node.outputs:
            if value.name == OUTPUT and value is not output:
                value.name = f"{OUTPUT}/inner"
    output.name = OUTPUT


def _take_weights(model: ir.Model) -> dict[str, Array]:
    """Large constants taken out of the model: {name: array}, those of external files mapped."""
    arrays: dict[str, Array] = {}
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            kind = tensor.dtype.numpy()
            arrays[name] = np.memmap(tensor.path, kind, "r", tensor.offset or 0, tuple(tensor.shape.numpy()))
        elif tensor.nbytes >= INLINE_BYTES:
            arrays[name] = tensor.numpy()
        else:
            continue
        value.const_value = left_out(tensor, name)
    return arrays


def _check_static(graph: Graph, path: Path) -> None:
    for node in graph.nodes:
        for value in node.outputs:
            if value.shape is None or not all(isinstance(one, int) for one in value.shape):
                raise ModelError(
                    f"{path}: {value.name} ({node.op}) has no static shape, even for the recorded inputs",
                    hint="export the network with static shapes",
                )
