"""What a check is, and how a rule finds its own by name.

A primitive is a frozen struct in a checks_*.py file beside this one, `class MaxRank(Check, frozen=True,
tag="max_rank")`; its fields are the parameters that a rule's `check` table gives, typed. It overrides `unit` (asked
about each unit the rule matches) or `find` (asked once per graph) and yields what is wrong; the rule says why that
matters.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, Union

import msgspec

from vdq_export.graph import Node
from vdq_export.lint import signature
from vdq_export.lint.table import Rule, Table, TableError
from vdq_export.lint.view import Unit, View, node_name, op_name


class Hit(NamedTuple):
    """Something wrong at a node; `node` and `op` are empty for what concerns the whole graph."""

    node: str
    op: str
    message: str

    @staticmethod
    def at(node: Node, message: str) -> Hit:
        return Hit(node_name(node), op_name(node), message)


@dataclass(frozen=True)
class Scope:
    """What a check may look at. `units`: those whose operator the rule names."""

    view: View
    table: Table
    units: Sequence[Unit]


class Check(msgspec.Struct, frozen=True, tag_field="name", forbid_unknown_fields=True):
    def find(self, scope: Scope) -> Iterator[Hit]:
        for unit in scope.units:
            for message in self.unit(unit, scope):
                yield Hit.at(unit.node, message)

    def unit(self, unit: Unit, scope: Scope) -> Iterator[str]:
        raise NotImplementedError(type(self).__name__)


@cache
def registry() -> dict[str, type[Check]]:
    """Name -> primitive, from every checks_*.py beside this file."""
    package = __name__.rpartition(".")[0]
    for module in pkgutil.iter_modules(import_module(package).__path__):
        if module.name.startswith("checks_"):
            import_module(f"{package}.{module.name}")
    return {str(kind.__struct_config__.tag): kind for kind in Check.__subclasses__()}


def of_rule(rule: Rule) -> Check:
    """The check a rule asks for. Raises TableError for an unknown name or parameters that do not fit."""
    kinds: Any = Union[tuple(registry().values())]  # noqa: UP007  # made at run time
    try:
        check: Check = msgspec.convert(rule.check, kinds)
    except msgspec.ValidationError as error:
        raise TableError(f"{rule.id}: check {rule.check}: {error}", hint=f"known: {', '.join(registry())}") from error
    return check


def matches(rule: Rule, unit: Unit) -> bool:
    named = not rule.ops or any(fnmatchcase(unit.op, pattern) for pattern in rule.ops)
    return named and (not rule.types or any(signature.parse(text).takes(unit) for text in rule.types))
