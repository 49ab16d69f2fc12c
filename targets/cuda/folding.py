"""What of a graph is known before it runs: its constants, and all that follows from constants alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from vdq_export.errors import CompileError
from vdq_export.targets.cuda.onnx_parts import Constant, Op, Parts, folded
from vdq_export.targets.cuda.rules import RULES
from vdq_export.targets.cuda.torch_quant import TYPES, cast, cast_like

LIMIT = 1 << 22  # bytes that are read or made to fold a node: weights stay in their few bits
CASTS: Mapping[str, Callable[..., Tensor]] = {"Cast": cast, "CastLike": cast_like}
_ONNX = {stored.dtype: code for code, stored in reversed(TYPES.items())}


class UnknownOperatorError(CompileError):
    """A graph holds an operator, or a form of one, that there is no torch function for."""


class Known:
    """The constants of a graph, and `ops`: the nodes that are left to run."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self.where = parts, parts.where
        self.constants = dict(parts.constants)
        with torch.no_grad():
            self.ops = [op for op in parts.ops if not self._fold(op)]

    def static(self, op: Op, index: int) -> Any:
        """An input as Python values. Raises CompileError when it is not known."""
        name = op.inputs[index]
        if not name:
            return None
        if name not in self.constants:
            raise CompileError(
                f"{self.where}: {op.type} node {op.name} computes its shape (input {name}) as it runs",
                hint="export with static shapes",
            )
        found = self.constants[name].tensor.tolist()
        return tuple(found) if isinstance(found, list) else found

    def attributes(self, op: Op) -> dict[str, Any]:
        """As the torch function takes them."""
        found = dict(op.attributes)
        if op.type.endswith("QuantizeLinear") and not op.type.endswith("DequantizeLinear") and len(op.inputs) > 2:
            zero = self.constants.get(op.inputs[2])
            if zero is not None:
                found["output_dtype"] = zero.type  # 4 bits lie in 8
        if op.type == "ConstantOfShape" and "value" in found:
            found["value"] = found["value"].tensor
        return found

    def check(self, op: Op, run: Callable[..., Any], arguments: Sequence[Any], attributes: Mapping[str, Any]) -> None:
        """Raises UnknownOperatorError when `run` does not take what the node has."""
        wrong = ""
        try:
            inspect.signature(run).bind(*arguments, **attributes)
        except ValueError:  # torch's own functions say nothing about themselves, and take no attributes of ONNX
            wrong = f"attribute {next(iter(attributes))}" if attributes else ""
        except TypeError as error:
            wrong = str(error)
        if not wrong and op.type != "Split" and any(op.outputs[1:]):
            wrong = "more than one output"
        if wrong:
            raise UnknownOperatorError(
                f"{self.where}: node {op.name} is a form of {op.type} that is not known: {wrong}"
            )

    def _fold(self, op: Op) -> bool:
        """Whether the results are known; they are then constants."""
        if op.type == "Constant":
            self.constants[op.outputs[0]] = _literal(op)
            return True
        if op.type in ("Shape", "Size"):
            self.constants[op.outputs[0]] = folded(self._shape(op), TensorProto.INT64)
            return True
        rule = RULES.get(op.type)
        run = rule.run if rule else CASTS.get(op.type)
        if run is None or any(name and name not in self.constants for name in op.inputs):
            return False
        given = [self.constants[name] if name else None for name in op.inputs]
        static = rule.static if rule else ()
        alone = all(
            i in static for i in range(len(given))
        )  # of shapes or ends alone: nothing says on which device it would run
        if sum(4 * torch.Size(one.shape).numel() for one in given if one) > LIMIT:
            return False
        arguments = [self.static(op, i) if i in static else one and one.tensor for i, one in enumerate(given)]
        attributes = self.attributes(op)
        self.check(op, run, arguments, attributes)
        found = run(*arguments, **attributes)
        results = found if isinstance(found, tuple) else (found,)
        if sum(one.nbytes for one in results) > LIMIT and not alone:
            return False
        for name, value in zip(op.outputs, results, strict=False):
            self.constants[name] = folded(value, _ONNX[value.dtype])
        return True

    def _shape(self, op: Op) -> Tensor:
        shape = self._parts.shapes.get(op.inputs[0])
        if shape is None:
            raise CompileError(f"{self.where}: node {op.name} asks for a shape that the file does not say")
        if op.type == "Size":
            return torch.tensor(torch.Size(shape).numel())
        chosen = shape[op.attributes.get("start", 0) : op.attributes.get("end")]
        return torch.tensor(chosen, dtype=torch.int64)


def _literal(op: Op) -> Constant:
    (kind, value), *_ = op.attributes.items()
    if isinstance(value, Constant):
        return value
    dtype = torch.int64 if kind.startswith("value_int") else torch.float32
    return folded(torch.tensor(value, dtype=dtype), _ONNX[dtype])
