"""Which floats are float32 and which have the compute type.

Float32 stay, whatever the compute type:

    scales, zero points, bounds: all that a row of the bins' table gives
    angles, the arguments of sin and cos, and what they come from: in bfloat16, 999 · frequency is off by radians
    statistics (means, maxima, …), and the squares that only they read: in float16 a square overflows from 256
    the logits of a softmax, where a mask was added: float16 has no −3·10³⁸
    what is small, modulation by timestep above all, and computed from small values by elementwise operators
    the residual stream, unless lower() is told otherwise: 2 dB nearer to float32 after six blocks (digits, 4-bit
    weights, bfloat16: 48.8 and 46.2 dB; int8: 44.0 and 42.6), and errors add up with depth; it is a hundredth of a
    large model's traffic

Products (MatMul, Conv, attention) take and give the compute type. Norms are float32 inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from vdq_export.targets.cuda import fused_ops
from vdq_export.targets.cuda.onnx_parts import Constant, Op, Port
from vdq_export.targets.cuda.rules import RULES, Kind
from vdq_export.targets.cuda.torch_quant import TYPES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SMALL = 1 << 18  # elements: a megabyte in float32
_PLAIN = (Kind.ELEMENTWISE, Kind.MOVE)
_CASTS = ("Cast", "CastLike")
_STATISTICS = ("Softmax", "LogSoftmax")
Types = dict[str, torch.dtype]


def kind_of(op: Op) -> Kind | None:
    """None: of domain vdq.cuda, see fused_ops, or a cast."""
    rule = RULES.get(op.type)
    return rule.kind if rule else None


def _multiplies(op: Op, name: str) -> bool:
    """Whether the operator runs on tensor cores and wants `name` in the compute type."""
    if not op.type.startswith(fused_ops.PREFIX):
        return kind_of(op) == Kind.MATRIX
    return name in fused_ops.operands(op, *fused_ops.COMPUTE.get(op.type.removeprefix(fused_ops.PREFIX), ()))


class Precision:
    """types: of every float value of the graph, by name; other values are not in it.

    dtype: the compute type; residual: of the residual stream.
    """

    def __init__(
        self, ops: Sequence[Op], inputs: Sequence[Port], constants: Mapping[str, Constant],
        shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, residual: torch.dtype,
    ) -> None:  # fmt: skip
        self._constants, self._shapes, self._dtype = constants, shapes, dtype
        self._readers: dict[str, list[Op]] = defaultdict(list)
        for op in ops:
            for name in op.inputs:
                self._readers[name].append(op)
        self.wanted = self._exact(ops) | self._statistics(ops)
        if residual == torch.float32:
            self.wanted |= self._stream(ops)
        self.types: Types = {one.name: self._entering(one) for one in inputs if one.dtype.is_floating_point}
        for op in ops:
            self.types |= self._results(op)

    def _exact(self, ops: Sequence[Op]) -> set[str]:
        """Angles, back to where they come from."""
        found: set[str] = set()
        for op in reversed(ops):
            rule = RULES.get(op.type)
            passed = (op.type in _CASTS or (rule and rule.kind in _PLAIN)) and not found.isdisjoint(op.outputs)
            if passed or (rule and rule.exact):
                found |= set(op.inputs) - {""}
        return found

    def _statistics(self, ops: Sequence[Op]) -> set[str]:
        """What elementwise operators compute for nobody but statistics and softmax."""
        return {
            op.outputs[0]
            for op in ops
            if kind_of(op) == Kind.ELEMENTWISE
            and (readers := self._readers[op.outputs[0]])
            and all(kind_of(one) == Kind.REDUCE or one.type in _STATISTICS for one in readers)
        }

    def _stream(self, ops: Sequence[Op]) -> set[str]:
        """The residual stream: chains of sums of two computed values of one shape, with moves between them."""
        carried: dict[str, set[str]] = {}  # value -> the sums it is or moves
        found: set[str] = set()
        for op in ops:
            names = fused_ops.operands(op, "residual") if op.type == "vdq.cuda.Linear" else op.inputs
            before = set().union(*(carried.get(name, set()) for name in names))
            if self._is_sum(op):
                if before:
                    found |= before | {op.outputs[0]}
                carried[op.outputs[0]] = {op.outputs[0]}
            elif kind_of(op) == Kind.MOVE and before:
                carried |= dict.fromkeys(op.outputs, before)
        return found

    def _is_sum(self, op: Op) -> bool:
        if op.type == "vdq.cuda.Linear":
            return bool(fused_ops.operands(op, "residual"))
        if op.type != "Add" or any(name in self._constants for name in op.inputs):
            return False
        a, b = (self._shapes.get(name) for name in op.inputs)
        return a is not None and a == b

    def _entering(self, port: Port) -> torch.dtype:
        if port.dtype not in FLOATS:
            return port.dtype
        size = torch.Size(port.shape).numel()
        wide = port.name in self.wanted or (size <= SMALL and not self._is_multiplied(port.name))
        return torch.float32 if wide else self._dtype

    def _is_multiplied(self, name: str) -> bool:
        """Whether a product reads the value, moved or not."""
        moved = (one.outputs for one in self._readers[name] if kind_of(one) == Kind.MOVE)
        return any(_multiplies(one, name) for one in self._readers[name]) or any(
            self._is_multiplied(other) for names in moved for other in names
        )

    def _results(self, op: Op) -> Types:
        """Types of the op's float results."""
        if op.type.startswith("vdq.cuda."):
            return self._fused(op)
        kind = kind_of(op)
        if op.type in _CASTS:
            return self._cast(op)
        if kind == Kind.OTHER:
            return {}
        known = [self.types[name] for name in op.inputs if name in self.types]
        if kind in (Kind.ELEMENTWISE, Kind.MOVE) and not known and not self._floats_of_constants(op):
            return {}
        if kind == Kind.REDUCE and not known:
            return {}
        if torch.float64 in known:
            return dict.fromkeys(op.outputs, torch.float64)
        wide = op.outputs[0] in self.wanted or kind == Kind.REDUCE
        if kind in _PLAIN:
            wide |= all(one == torch.float32 for one in known) if known else self._is_small(op)
        return dict.fromkeys(op.outputs, torch.float32 if wide else self._dtype)

    def _floats_of_constants(self, op: Op) -> bool:
        return any(name in self._constants and self._constants[name].is_float for name in op.inputs)

    def _cast(self, op: Op) -> Types:
        like = op.inputs[1] if op.type == "CastLike" else ""
        to = self.types.get(like) if like else TYPES[op.attributes["to"]].dtype
        if to is None and like in self._constants and self._constants[like].is_float:
            to = torch.float32
        if to not in (*FLOATS, torch.float64):
            return {}
        if to == torch.float64:
            return {op.outputs[0]: torch.float64}
        own = self.types.get(op.inputs[0])
        small = own in (torch.float32, torch.float64, None) and self._is_small(op)
        wide = small or op.outputs[0] in self.wanted
        return {op.outputs[0]: torch.float32 if wide else self._dtype}

    def _is_small(self, op: Op) -> bool:
        shape = self._shapes.get(op.outputs[0])
        return shape is not None and torch.Size(shape).numel() <= SMALL

    def _fused(self, op: Op) -> Types:
        found: Types = {}
        for index, name in enumerate(op.outputs):
            if name and fused_ops.is_float(op, index):
                wide = name in self.wanted or op.type in ("vdq.cuda.Row", "vdq.cuda.Pick")
                found[name] = torch.float32 if wide else self._dtype
        return found
