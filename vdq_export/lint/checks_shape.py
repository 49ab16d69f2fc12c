"""Checks of shapes, of the graph's form, and of operators as such."""

from __future__ import annotations

from collections.abc import Iterator

from vdq_export.lint import signature
from vdq_export.lint.checks import Check, Hit, Scope
from vdq_export.lint.view import Operand, Unit, static


class Forbidden(Check, frozen=True, tag="forbidden"):
    """Every unit the rule matches (by its ops and types) is a finding."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        yield f"{unit.op} with {signature.describe(unit)}"


class KnownOperator(Check, frozen=True, tag="known_operator"):
    """No [[operator]] row of the table lists the operator."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if scope.table.types_of(unit.op) is None:
            yield f"no row lists {unit.op}"


class KnownTypes(Check, frozen=True, tag="known_types"):
    """The operator is listed, but not with these operand types."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        known = scope.table.types_of(unit.op)
        if known is None or any(signature.parse(text).takes(unit) for text in known):
            return
        yield f"{unit.op} with {signature.describe(unit)}; listed: {' or '.join(dict.fromkeys(known))}"


class MaxRank(Check, frozen=True, tag="max_rank"):
    """An operand with more than `limit` dimensions."""

    limit: int

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        worst = max(
            (o for o in (*unit.inputs, *unit.outputs) if o.shape), key=lambda o: len(o.shape or ()), default=None
        )
        if worst is not None and worst.shape is not None and len(worst.shape) > self.limit:
            yield f"rank {len(worst.shape)}, at most {self.limit}: {worst.value.name} has shape {list(worst.shape)}"


class StaticShapes(Check, frozen=True, tag="static_shapes"):
    """A value whose shape is unknown or has a dimension that is no number; said where it first appears."""

    def find(self, scope: Scope) -> Iterator[Hit]:
        for value in scope.view.inputs:
            if not static(value.shape):
                yield Hit("", "", f"input {value.name} has shape {value.shape}")
        for unit in scope.units:
            fixed = all(static(o.shape) or o.code == "none" or o.shape == () for o in unit.inputs)
            for output in unit.outputs:
                if fixed and output.code != "none" and not static(output.shape):
                    yield Hit.at(unit.node, f"{output.value.name} has shape {output.shape}")


class GraphInputs(Check, frozen=True, tag="graph_inputs"):
    """Fewer than `at_least` inputs."""

    at_least: int

    def find(self, scope: Scope) -> Iterator[Hit]:
        if len(scope.view.inputs) < self.at_least:
            yield Hit("", "", f"the graph has {len(scope.view.inputs)} inputs, it needs {self.at_least}")


class Opset(Check, frozen=True, tag="opset"):
    """An opset outside [min, max]."""

    min: int
    max: int

    def find(self, scope: Scope) -> Iterator[Hit]:
        if not self.min <= scope.view.opset <= self.max:
            yield Hit("", "", f"opset {scope.view.opset}, not {self.min} to {self.max}")


class Attribute(Check, frozen=True, tag="attribute"):
    """An attribute whose value is not `allowed`; `default` where the node leaves it out."""

    attribute: str
    allowed: tuple[int | float | str, ...]
    default: int | float | str

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        value = unit.node.attrs.get(self.attribute, self.default)
        if value not in self.allowed:
            yield f"{self.attribute} = {value}, not {' or '.join(map(str, self.allowed))}"


class LastAxis(Check, frozen=True, tag="last_axis"):
    """An axis attribute that does not name the last dimension; `default` where the node leaves it out."""

    default: int
    attribute: str = "axis"

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        shape, axis = unit.inputs[0].shape, int(unit.node.attrs.get(self.attribute, self.default))
        if shape is not None and axis % max(len(shape), 1) != len(shape) - 1:
            yield f"{self.attribute} = {axis} of {len(shape)} dimensions, not the last"


class OneMatrix(Check, frozen=True, tag="one_matrix"):
    """Input 0 holds several matrices: its dimensions before the last two multiply to more than 1."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        shape = unit.inputs[0].shape or ()
        if any(size != 1 for size in shape[:-2]):
            yield f"input of shape {list(shape)}"


class Broadcast(Check, frozen=True, tag="broadcast"):
    """An operand repeated along `axis` (from the end, -3) but not along the axis behind it, where `readers` follow.

    Only where the axis behind has at least `least` entries, a multiple of `multiple`. An operand that Expand made
    counts as what was expanded.
    """

    axis: int
    readers: tuple[str, ...]
    least: int = 2
    multiple: int = 1

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        output = unit.outputs[0]
        read_by = [reader.op for reader in scope.view.readers(output) if reader.op in self.readers]
        if not read_by or output.shape is None or not static(output.shape) or len(output.shape) < -self.axis:
            return
        for operand in unit.inputs:
            shape = _unexpanded(operand, scope)
            if shape and not static(shape):
                continue
            own = [1] * (len(output.shape) - len(shape)) + list(shape)
            behind = own[self.axis + 1]
            if own[self.axis] == 1 < output.shape[self.axis] and behind >= self.least and behind % self.multiple == 0:
                yield f"{list(shape)} broadcast to {list(output.shape)} in {unit.op}, read by {read_by[0]}"


def _unexpanded(operand: Operand, scope: Scope) -> tuple[int, ...]:
    for maker in scope.view.makers(operand):
        if maker.op == "Expand":
            operand = maker.inputs[0]
    return operand.shape or ()
