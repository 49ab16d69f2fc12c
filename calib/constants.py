"""How an operator's constants are quantized, for targets that leave no operator in float.

Symmetric where a constant is multiplied and summed (Conv, MatMul; in 8 bits where those hold it exactly), asymmetric in
the operator's own type elsewhere. The gain of a LayerNormalization has 8 bits: HTP compilers refuse 16 unsigned ones.
Its shift, and a Conv's bias, are added to sums: 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vdq_export.calib.ranges import Grid, affine
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.plan import INT_RANGE, ConstantPlan, IntType

_SETTINGS = {"Pow": (1,), "Clip": (1, 2)}  # operands that stay float: they say what to do, they are no data
_SHIFT_LEVELS = 2**24  # of a LayerNormalization's shift: finer than a float32 of its size


class _Role(NamedTuple):
    dtype: IntType | str
    axis: int | None
    symmetric: bool
    why: str


def plan_constants(graph: Graph, dtype_of: Callable[[Node], IntType]) -> Iterator[ConstantPlan]:
    """One entry for each float constant and each way it is read. Weights of linears are left out.

    dtype_of: type of the activations that a node reads. Raises CalibrationError for NaN or Inf in a constant.
    """
    weights = {id(linear.weight) for linear in graph.linears()}
    found: dict[tuple[int, _Role], list[str]] = {}
    constants: dict[int, Value] = {}
    for node in graph.nodes:
        for index, operand in enumerate(node.inputs):
            if not is_constant(operand) or operand.dtype != np.float32 or index in _SETTINGS.get(node.op, ()):
                continue
            if id(operand) in weights and node.op == "MatMul":
                continue
            constants[id(operand)] = operand
            readers = found.setdefault((id(operand), _role(node, index, operand, dtype_of(node))), [])
            if node.name not in readers:
                readers.append(node.name)
    for (key, role), readers in found.items():
        yield _plan(constants[key], role, tuple(readers))


def _role(node: Node, index: int, constant: Value, dtype: IntType) -> _Role:
    if node.op == "Conv":
        return (
            _Role("int8", 0, True, "weight of a Conv") if index == 1 else _Role("int32", None, True, "bias of a Conv")
        )
    if node.op == "LayerNormalization":
        shift = _Role("int32", None, True, "shift of a LayerNormalization")
        return _Role("uint8", None, False, "gain of a LayerNormalization") if index == 1 else shift
    if node.op in ("MatMul", "Gemm"):
        wide = dtype == "uint16" and not _fits_int8(constant.values)
        return _Role("int16" if wide else "int8", None, True, "factor of a product")
    return _Role(dtype, None, False, f"operand of {node.op}")


def _fits_int8(values: Array) -> bool:
    """Whether 8 symmetric bits hold every number up to float32's rounding, as those of a Hadamard matrix.

    Then 16 would be worse: their products, at full scale, leave an HTP's accumulator no room.
    """
    codes = values.astype(np.float64) / (np.abs(values).max(initial=0.0) or 1.0) * INT_RANGE["int8"][1]
    return bool(np.abs(codes - np.rint(codes)).max(initial=0.0) <= INT_RANGE["int8"][1] * 2.0**-20)


def _plan(constant: Value, role: _Role, readers: tuple[str, ...]) -> ConstantPlan:
    values: Array = constant.values
    if not np.isfinite(values).all():
        raise CalibrationError(f"constant {constant.name}, read by {readers[0]}, holds NaN or Inf")
    scale, zero = _parameters(values, role)
    return ConstantPlan(
        name=constant.name, dtype=role.dtype, axis=role.axis, scale=scale, zero_point=zero, readers=readers,  # type: ignore[arg-type]
        why=role.why,
    )  # fmt: skip


def _parameters(values: Array, role: _Role) -> tuple[tuple[float, ...], int]:
    if role.dtype == "int32":
        if role.why.startswith("bias"):
            return (), 0
        return (_positive(np.abs(values).max(initial=0.0) / _SHIFT_LEVELS),), 0
    low, high = INT_RANGE[role.dtype]
    if role.symmetric:
        axes = tuple(d for d in range(values.ndim) if d != role.axis) if role.axis is not None else None
        peaks = np.abs(values).max(axis=axes, initial=0.0)
        return tuple(_positive(peak / high) for peak in np.atleast_1d(peaks)), 0
    scale, zero = affine(float(values.min()), float(values.max()), Grid(role.dtype, (high - low).bit_length()))  # type: ignore[arg-type]
    return (scale,), zero


def _positive(scale: float) -> float:
    """A float32 scale; 1 where there is nothing to scale."""
    rounded = float(np.float32(scale))
    return rounded if rounded > 0 else 1.0
