"""Checks of shapes, of the graph's form, and of operators as such."""

from __future__ import annotations

from collections.abc import Iterator

from vdq_export.lint import signature
from vdq_export.lint.checks import Check, Hit, Scope
from vdq_export.lint.view import Unit, static


class Forbidden(Check, frozen=True, tag="forbidden"):
    """Every unit the rule matches is a finding; `types`: only with these operand types."""

    types: tuple[str, ...] = ()

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if not self.types or any(signature.parse(text).takes(unit) for text in self.types):
            yield f"{unit.op} with {signature.describe(unit)}" if self.types else f"{unit.op} in the graph"


class KnownOperator(Check, frozen=True, tag="known_operator"):
    """No [[operator]] row of the table lists the operator."""

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        if scope.table.types_of(unit.op) is None:
            yield f"no row lists {unit.op}"


class KnownTypes(Check, frozen=True, tag="known_types"):
    """The operator is listed, but not with these operand types; silent where a `forbidden` rule with types speaks."""

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


class BroadcastConstant(Check, frozen=True, tag="broadcast_constant"):
    """A constant operand of lower shape than the output, repeated along dimension 0, where one of `readers` follows."""

    readers: tuple[str, ...]

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        output = unit.outputs[0]
        read_by = [reader.op for reader in scope.view.readers(output) if reader.op in self.readers]
        for operand in unit.inputs:
            if not (read_by and operand.constant and operand.shape and output.shape):
                continue
            full = len(operand.shape) == len(output.shape) > 2
            if full and operand.shape[0] == 1 and output.shape[0] > 1:
                yield f"constant {list(operand.shape)} + {list(output.shape)}, read by {read_by[0]}"
