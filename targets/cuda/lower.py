"""An ONNX graph of static shapes as a torch.fx program: one call a node, weights as buffers.

    program = lower("graphs/cuda.00.onnx", device="cuda", weights=shared)
    program.capture()                                   # on a GPU: replayed as one CUDA graph from now on
    sample = program({"hidden_states": x, …, "bin": row})["sample"]

What depends on constants alone is computed here, shapes among it, so that a run reads nothing off the device and a
captured graph holds all of it. Weights are mapped from their files and become buffers once for all programs that are
given the same dict; on the CPU, in float32, the buffers are the mapped pages. Which floats stay float32: precision.py.
Intermediate values are freed behind their last reader: torch.fx writes that into the program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, fx

from vdq_export.errors import CompileError, MissingToolError
from vdq_export.targets.cuda import fused_ops
from vdq_export.targets.cuda.folding import CASTS, Known, UnknownOperatorError
from vdq_export.targets.cuda.onnx_parts import Constant, Op, Parts, folded, parts_of
from vdq_export.targets.cuda.precision import Precision
from vdq_export.targets.cuda.program import FLOAT, Program
from vdq_export.targets.cuda.rules import RULES, Kind, Rule

__all__ = ["UnknownOperatorError", "lower"]
Change = Callable[[Tensor], Tensor]


def lower(
    model: str | Path | onnx.ModelProto,
    *,
    folder: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = FLOAT,
    weights: dict[Any, Any] | None = None,
    residual: torch.dtype | None = None,
) -> Program:
    """The program of `model`; a ModelProto's external data lies in `folder`.

    dtype: of floats between kernels (bfloat16, float32). residual: of the residual stream; None: float32. weights: what
    programs of one folder share; each call finds there what is on the device, and adds to it. device "meta": shapes
    without values, to write down which kernels would run.
    Raises UnknownOperatorError, CompileError for a graph that is not static, MissingToolError for a GPU without
    a CUDA build of torch or without Triton.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingToolError("no GPU that torch can use", hint=f"a CUDA build of torch is needed: {fused_ops.HINT}")
    parts = parts_of(model, folder)
    with torch.no_grad():
        return _Lowering(parts, device, dtype, {} if weights is None else weights, residual or torch.float32).program()


class _Lowering:
    def __init__(
        self, parts: Parts, device: torch.device, dtype: torch.dtype, weights: dict[Any, Any], residual: torch.dtype
    ) -> None:
        self._parts, self._device, self._dtype, self._weights = parts, device, dtype, weights
        self._known = Known(parts)
        self._constants = self._known.constants
        found = Precision(self._known.ops, parts.inputs, self._constants, parts.shapes, dtype, residual)
        self._types = found.types
        self._graph = fx.Graph()
        self._values: dict[str, fx.Node] = {}
        self._buffers: dict[str, Any] = {}  # attribute of the module -> tensor or Weight
        self._held: dict[Any, fx.Node] = {}  # key of a buffer -> its node

    def program(self) -> Program:
        inputs = [type(one)(one.name, one.shape, self._types.get(one.name, one.dtype)) for one in self._parts.inputs]
        for one in inputs:
            self._values[one.name] = self._graph.placeholder(_identifier(one.name))
        for op in self._known.ops:
            if op.type.startswith(fused_ops.PREFIX):
                self._fused(op)
            else:
                self._standard(op)
        floats = [one.dtype if one.dtype.is_floating_point else None for one in self._parts.outputs]
        results = [self._value(one.name, dtype) for one, dtype in zip(self._parts.outputs, floats, strict=True)]
        self._graph.output(tuple(results))
        module = fx.GraphModule(self._buffers, self._graph)
        return Program(module, inputs, self._parts.outputs, self._device, list(self._buffers.values()))

    # -- constants ---------------------------------------------------------------------------------------------------

    def _buffer(self, name: str, dtype: torch.dtype | None, change: Change | None = None) -> fx.Node:
        """A constant on the device; dtype: of floats."""
        constant = self._constants[name]
        floats = dtype if constant.is_float and dtype is not None else None
        key = (*constant.key, floats, str(self._device), change)

        def make() -> Tensor:
            held = constant.read(self._device)
            held = held if floats is None else _cast(held, floats)
            return change(held) if change else held

        return self._attribute(key, name, make)

    def _attribute(self, key: Any, name: str, make: Callable[[], Any]) -> fx.Node:
        if key not in self._held:
            if key not in self._weights:
                self._weights[key] = make()
            attribute = f"_{len(self._buffers)}_{_identifier(name)}"
            self._buffers[attribute] = self._weights[key]
            self._held[key] = self._graph.get_attr(attribute)
        return self._held[key]

    # -- values ------------------------------------------------------------------------------------------------------

    def _value(self, name: str, dtype: torch.dtype | None = None) -> fx.Node:
        """A value or constant; dtype: what floats are cast to, None: as they are."""
        if name in self._constants:
            return self._buffer(name, dtype)
        if name not in self._values:
            raise CompileError(f"{self._parts.where}: nothing computes {name!r}")
        node = self._values[name]
        own = self._types.get(name)
        return node if dtype is None or own in (None, dtype) else self._cast(node, dtype)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self._graph.call_method("to", (node, dtype))

    def _standard(self, op: Op) -> None:
        rule = RULES.get(op.type)
        if op.type in CASTS:
            return self._cast_node(op)
        if rule is None:
            raise UnknownOperatorError(
                f"{self._parts.where}: no torch function for {op.type}, node {op.name}",
                hint="targets/cuda/rules.py lists those that there are",
            )
        arguments = [self._argument(op, rule, index) for index in range(len(op.inputs))]
        attributes = self._known.attributes(op)
        self._known.check(op, rule.run, arguments, attributes)
        node = self._graph.call_function(rule.run, tuple(arguments), attributes)
        self._give(op, node, several=op.type == "Split")
        return None

    def _argument(self, op: Op, rule: Rule, index: int) -> Any:
        name = op.inputs[index]
        if not name:
            return None
        if index in rule.static:
            return self._known.static(op, index)
        constant = self._constants.get(name)
        if constant is not None:
            if index in rule.scalars and self._is_number(op, rule, constant):
                return constant.tensor.reshape(()).item()
            return self._buffer(name, self._constant_type(op, rule))
        return self._value(name, self._wanted(op, rule))

    def _is_number(self, op: Op, rule: Rule, constant: Constant) -> bool:
        """Whether a Python number does as well: another operand then says type and shape."""
        if constant.shape == (1,) and op.type.endswith("RotaryEmbedding"):
            return True
        others = [name for name in op.inputs if name and name not in self._constants]
        if rule.kind == Kind.ELEMENTWISE and constant.is_float:
            others = [name for name in others if name in self._types]
        return constant.shape == () and bool(others)

    def _result_type(self, op: Op) -> torch.dtype | None:
        return self._types.get(op.outputs[0])

    def _wanted(self, op: Op, rule: Rule) -> torch.dtype | None:
        """What computed floats are cast to where they enter this operator; None: they stay."""
        result = self._result_type(op)
        if rule.kind == Kind.MATRIX:
            return self._dtype if result != torch.float64 else result
        if rule.kind == Kind.MOVE or (rule.kind == Kind.ELEMENTWISE and result == torch.float32):
            return result
        return None

    def _constant_type(self, op: Op, rule: Rule) -> torch.dtype:
        """What floats among the constants are."""
        known = {self._types[name] for name in op.inputs if name in self._types}
        if rule.kind in (Kind.MATRIX, Kind.MOVE):
            return self._wanted(op, rule) or torch.float32
        if rule.kind in (Kind.ELEMENTWISE, Kind.NORM) and known <= {self._dtype}:
            return self._dtype if self._result_type(op) == self._dtype else torch.float32
        return torch.float32

    def _cast_node(self, op: Op) -> None:
        wanted = self._types.get(op.outputs[0])
        if wanted is not None:
            self._values[op.outputs[0]] = self._cast(self._value(op.inputs[0]), wanted)
            return
        attributes = dict(op.attributes)
        given = tuple(self._value(name) for name in op.inputs)
        self._values[op.outputs[0]] = self._graph.call_function(CASTS[op.type], given, attributes)

    def _give(self, op: Op, node: fx.Node, *, several: bool) -> None:
        """Name the results, each of the type that was chosen for it."""
        for index, name in enumerate(op.outputs):
            if not name:
                continue
            found = self._graph.call_function(operator.getitem, (node, index)) if several else node
            if name in self._types and self._may_differ(op):
                found = self._cast(found, self._types[name])
            found.meta["onnx"] = name
            self._values[name] = found

    def _may_differ(self, op: Op) -> bool:
        """Whether torch's result may have another float type than the one chosen for it."""
        if self._dtype == torch.float32 or op.type.startswith(fused_ops.PREFIX):
            return False
        rule, result = RULES[op.type], self._result_type(op)
        known = {self._types[name] for name in op.inputs if name in self._types}
        if rule.kind in (Kind.ELEMENTWISE, Kind.NORM):
            return known != {result}
        return rule.kind == Kind.WIDE and result != torch.float32

    # -- vdq.cuda ----------------------------------------------------------------------------------------------------

    def _fused(self, op: Op) -> None:
        short = op.type.removeprefix(fused_ops.PREFIX)
        if short == "Row":
            bins, index = (self._value(name, torch.float32) for name in op.inputs)
            return self._give(op, self._graph.call_function(fused_ops.row, (bins, index)), several=False)
        if short == "Pick":
            given = (self._value(op.inputs[0]),)
            return self._give(op, self._graph.call_function(fused_ops.pick, given, dict(op.attributes)), several=False)
        if short not in fused_ops.CALLS:
            raise UnknownOperatorError(f"{self._parts.where}: no kernel for {op.type}, node {op.name}")
        operands = self._operands(op, short)
        attributes = {"dtype": self._types.get(op.outputs[0], self._dtype), **self._options(op, short, operands)}
        if short == "Linear":
            operands["weight"] = self._weight(op)
            attributes["n"] = self._constants[fused_ops.named(op)["weight"]].shape[1]
        node = self._graph.call_function(fused_ops.CALLS[short], (), {**operands, **attributes})
        return self._give(op, node, several=short != "Rope")

    def _operands(self, op: Op, short: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in fused_ops.named(op).items():
            if name in ("weight", "weight_scale") and short == "Linear":
                continue
            compute = name in fused_ops.COMPUTE.get(short, ())
            change = fused_ops.vector if name in fused_ops.VECTORS.get(short, ()) else None
            change = fused_ops.table if name in fused_ops.TABLES.get(short, ()) else change
            if value in self._constants:
                found[name] = self._number(value, self._dtype if compute else torch.float32, change)
            else:
                node = self._value(value, self._dtype if compute else None)
                found[name] = self._graph.call_function(change, (node,)) if change else node
        return found

    def _number(self, name: str, dtype: torch.dtype, change: Change | None) -> fx.Node:
        """A constant operand of a kernel: float32 where it is an integer zero point."""
        if not self._constants[name].is_float:
            self._constants[name] = folded(self._constants[name].tensor.float(), TensorProto.FLOAT)
        return self._buffer(name, dtype, change)

    def _options(self, op: Op, short: str, operands: dict[str, Any]) -> dict[str, Any]:
        """Attributes by the kernels' names; operands loses what a quantizer takes."""
        given = dict(op.attributes)
        low, high, out = given.pop("low_level", -128), given.pop("high_level", 127), given.pop("out_type", "none")
        given.pop("weight_type", None), given.pop("group", None)
        if short == "Rope":
            operands["scale"] = operands.pop("out_scale", None)
            if out == "float8e4m3fn":
                given["codes"] = fused_ops.CODES[out]
            return {**given, "interleaved": bool(given.get("interleaved", 0))}
        scale, zero = operands.pop("out_scale", None), operands.pop("out_zero", None)
        if scale is not None:
            levels = {"low": low, "high": high, "dtype": fused_ops.CODES[out]}
            given["quant"] = self._graph.call_function(fused_ops.quantizer, (scale, zero), levels)
        return {**given, "keep": bool(op.outputs[0])}

    def _weight(self, op: Op) -> fx.Node:
        names = fused_ops.named(op)
        group, kind = op.attributes.get("group", 0), fused_ops.KINDS[op.attributes["weight_type"]]
        for one in ("weight", "weight_scale"):
            if names.get(one) not in self._constants:
                raise CompileError(f"{self._parts.where}: node {op.name} has no constant {one}")
        codes, scale = self._constants[names["weight"]], self._constants[names["weight_scale"]]
        key = (codes.key, scale.key, group, kind, str(self._device))

        def make() -> Any:
            given = (codes.read(self._device), scale.read(self._device))
            return fused_ops.prepare(*given, group, kind, self._device)

        return self._attribute(key, names["weight"], make)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Finite numbers stay finite: masks hold the lowest of float32, which would make NaN of a row that is all mask."""
    if dtype in (torch.float16, torch.bfloat16) and x.numel() and x.dtype == torch.float32:
        limits = torch.finfo(dtype)
        x = torch.where(x.isfinite(), x.clamp(limits.min, limits.max), x)
    return x.to(dtype)


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() and c.isascii() else "_" for c in name) or "value"
