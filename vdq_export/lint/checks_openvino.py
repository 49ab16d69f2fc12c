"""Checks of what OpenVINO does otherwise than a graph says: types of computed values, size of weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vdq_export.graph import is_constant
from vdq_export.graphs.cut import QUANTIZE
from vdq_export.lint.checks import Check, Hit, Scope
from vdq_export.lint.view import Unit


class QuantizedTo(Check, frozen=True, tag="quantized_to"):
    """A computed value that is quantized to one of `dtypes`."""

    dtypes: tuple[str, ...]

    def find(self, scope: Scope) -> Iterator[Hit]:
        for node, encoding in scope.view.quantizers:
            if node.op == QUANTIZE and encoding.dtype in self.dtypes and not is_constant(node.inputs[0]):
                yield Hit.at(node, f"{node.inputs[0].name} is quantized to {encoding.dtype}")


class WeightMagnitude(Check, frozen=True, tag="weight_magnitude"):
    """An 8-bit weight beyond ±`limit` that meets a quantized input. Reads the weights, one at a time."""

    limit: int
    operand: int = 1

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if len(unit.inputs) <= self.operand or unit.inputs[0].encoding is None:
            return
        weight = unit.inputs[self.operand]
        if weight.encoding is None or weight.encoding.dtype != "s8" or not is_constant(weight.source):
            return
        q = np.asarray(weight.source.values)
        if q.dtype != np.int8:
            return
        largest = max(int(q.max(initial=0)), -int(q.min(initial=0)))
        if largest > self.limit:
            yield f"weight {weight.source.name} has {largest}, at most {self.limit}"
