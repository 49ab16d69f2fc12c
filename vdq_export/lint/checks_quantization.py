"""Checks of Q/DQ: is every operand quantized, and how its scales and zero points lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vdq_export.graphs.cut import DEQUANTIZE, QUANTIZE
from vdq_export.lint import signature
from vdq_export.lint.checks import Check, Hit, Scope
from vdq_export.lint.view import Operand, Unit

_FLOATS = ("f32", "f16", "bf16", "f64")


class Quantized(Check, frozen=True, tag="quantized"):
    """A float operand without encoding, unless an [[operator]] row takes it so."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if any(signature.parse(text).takes(unit) for text in scope.table.types_of(unit.op) or ()):
            return
        for index, operand in enumerate(unit.inputs):
            if operand.code in _FLOATS:
                yield f"input {index} ({operand.value.name}) has no DequantizeLinear in front"
        for index, operand in enumerate(unit.outputs):
            if operand.code in _FLOATS:
                read = "is also read unquantized" if operand.value.outputs else "has no QuantizeLinear behind"
                yield f"output {index} ({operand.value.name}) {read}"


class SameType(Check, frozen=True, tag="same_type"):
    """Quantized operands of unlike types among the outputs and the first `inputs` inputs (0: all)."""

    inputs: int = 0
    constants: bool = True  # whether stored operands count

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        asked = [*unit.inputs[: self.inputs or None], *unit.outputs]
        asked = [operand for operand in asked if self.constants or not operand.constant]
        types = dict.fromkeys(operand.encoding.dtype for operand in asked if operand.encoding is not None)
        if len(types) > 1:
            yield f"{' and '.join(types)} in one {unit.op} ({signature.describe(unit)})"


class RangeContains(Check, frozen=True, tag="range_contains"):
    """An operand whose quantized range does not reach `value`."""

    operand: int
    value: float

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        found = _at(unit, self.operand)
        bounds = found.encoding.range if found is not None and found.encoding is not None else None
        if bounds is not None and not bounds[0] <= self.value <= bounds[1]:
            yield f"{self.value:g} lies outside the range of input {self.operand}"


class ScalarScales(Check, frozen=True, tag="scalar_scales"):
    """A single scale, or its zero point, that is stored with a dimension ([1] instead of [])."""

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            numbers = [array for array in (encoding.scale, encoding.zero_point) if array is not None]
            if not encoding.block and any(array.size == 1 and array.ndim > 0 for array in numbers):
                yield Hit.at(node, "one scale for the tensor, stored with shape [1] instead of []")


class PositiveScales(Check, frozen=True, tag="positive_scales"):
    """A scale that is zero, negative or no finite float32."""

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            if encoding.scale is not None:
                scale = np.asarray(encoding.scale, np.float32)
                if not (np.isfinite(scale) & (scale > 0)).all():
                    yield Hit.at(node, "a scale is zero, negative or not finite")


class Symmetric(Check, frozen=True, tag="symmetric"):
    """A zero point other than 0 in an encoding of one of `kinds` ("/c", "/b", "" per tensor) and `dtypes` (all)."""

    kinds: tuple[str, ...]
    dtypes: tuple[str, ...] = ()

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            asked = encoding.kind in self.kinds and (not self.dtypes or encoding.dtype in self.dtypes)
            if asked and encoding.zero_point is not None and np.any(np.asarray(encoding.zero_point, np.int64)):
                yield Hit.at(node, f"{encoding.code} with a zero point other than 0")


class OutputChannelScales(Check, frozen=True, tag="output_channel_scales"):
    """Scales per channel that lie along another axis than the weight's output channels."""

    operand: int = 1

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        found = _at(unit, self.operand)
        if found is None or found.encoding is None or found.encoding.kind != "/c" or found.source.shape is None:
            return
        rank = len(found.source.shape)
        axis, wanted = found.encoding.axis % rank, _output_axis(unit, rank)
        if axis != wanted:
            yield f"weight {found.source.name}: scales along axis {axis}, output channels are axis {wanted}"


class ScaleSpread(Check, frozen=True, tag="scale_spread"):
    """Scales of one tensor whose largest is more than `limit` times the smallest."""

    limit: float
    operand: int = 1

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        found = _at(unit, self.operand)
        if found is None or found.encoding is None or found.encoding.scale is None or not found.encoding.scale.size:
            return
        scale = np.asarray(found.encoding.scale, np.float64)
        if scale.max() > self.limit * scale.min() > 0:
            yield f"weight {found.source.name}: scales of its channels differ more than {self.limit:g} times"


class Blocks(Check, frozen=True, tag="blocks"):
    """Blocked weights of other block sizes than `sizes`, or blocked along another axis than the input channels."""

    sizes: tuple[int, ...]
    operand: int = 1

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        found = _at(unit, self.operand)
        if found is None or found.encoding is None or not found.encoding.block:
            return
        if found.encoding.block not in self.sizes:
            yield f"blocks of {found.encoding.block}, not {' or '.join(map(str, self.sizes))}"
        rank = len(found.source.shape or ())
        if rank == 2 and found.encoding.axis % rank == _output_axis(unit, rank):
            yield "blocks along the output channels"


class MatchingScales(Check, frozen=True, tag="matching_scales"):
    """An operator that only moves values, whose outputs are scaled otherwise than one of these `inputs`.

    several: only where input 1, the indices, has more than one entry.
    """

    inputs: tuple[int, ...] = (0,)
    several: bool = False

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if self.several and all(size == 1 for size in unit.inputs[1].shape or ()):
            return
        moved = [found for index in self.inputs if (found := _at(unit, index)) is not None]
        if len({_numbers(o) for o in (*moved, *unit.outputs) if o.encoding is not None}) > 1:
            yield f"{unit.op} moves values between unlike scales"


class BiasScale(Check, frozen=True, tag="bias_scale"):
    """An int32 bias whose scale is not input scale times weight scale (relative difference above `tolerance`)."""

    tolerance: float
    operand: int = 2

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        bias = _at(unit, self.operand)
        if bias is None or bias.encoding is None or bias.encoding.dtype != "s32":
            return
        scales = [o.encoding.scale if o.encoding else None for o in (unit.inputs[0], unit.inputs[1], bias)]
        if any(scale is None for scale in scales):
            return
        value, weight, found = (np.asarray(scale, np.float64).reshape(-1) for scale in scales)
        if found.size > 1 and weight.size not in (1, found.size):
            yield f"{found.size} bias scales for {weight.size} weight scales"
        elif value.size not in (1, found.size) or not np.allclose(found, value * weight, rtol=self.tolerance, atol=0):
            yield "the bias' scale is not input scale x weight scale"


class Stranded(Check, frozen=True, tag="stranded_quantizer"):
    """A Q whose result is not dequantized, or a DQ of something neither quantized in the graph nor constant."""

    def find(self, scope: Scope) -> Iterator[Hit]:
        outputs = {value.name for value in scope.view.outputs}
        for node, _ in scope.view.quantizers:
            if node.op == QUANTIZE and node.outputs[0].name not in outputs:
                others = [n.op for n in node.outputs[0].outputs if n.op != DEQUANTIZE]
                if others or not node.outputs[0].outputs:
                    yield Hit.at(node, f"the quantized value goes to {', '.join(others) or 'nobody'}")


def _at(unit: Unit, index: int) -> Operand | None:
    return unit.inputs[index] if index < len(unit.inputs) else None


def _output_axis(unit: Unit, rank: int) -> int:
    """The axis of a weight's output channels: MatMul [K, N] -> 1, Gemm by transB, Conv [N, K, …] -> 0."""
    if unit.op == "MatMul":
        return rank - 1
    if unit.op == "Gemm":
        return 0 if unit.node.attrs.get("transB", 0) else 1
    return 1 if unit.op == "ConvTranspose" else 0


def _numbers(operand: Operand) -> tuple[bytes, bytes]:
    encoding = operand.encoding
    scale = b"" if encoding is None or encoding.scale is None else np.asarray(encoding.scale, np.float32).tobytes()
    zero = b"" if encoding is None or encoding.zero_point is None else np.asarray(encoding.zero_point).tobytes()
    return scale, zero
