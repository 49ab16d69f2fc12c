"""The rule tables: targets/tables/NAME.toml, one a consumer, read into checked rules. Each row says how we know."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

from vdq_export.errors import UnknownNameError, VdqError
from vdq_export.lint import signature

Severity = Literal["error", "warning"]
Kind = Literal["refused", "wrong", "fallback", "slow", "advice"]


class TableError(VdqError):
    """A rule table that does not fit its format."""


class _Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Rule(_Row, frozen=True):
    """One row: units of `ops` with operand types among `types` that `check` objects to are findings.

    kind: what the consumer does: `refused`; `wrong` (accepted, other numbers come out); `fallback` (leaves the
    operator to the CPU); `slow` (right, but not in integers); `advice`. ops (globs), types (see signature.py), archs:
    empty means all. `check` is {name = a primitive of checks_*.py, its parameters}. `fix` says what to change in the
    graph or the export. otherwise: silent at nodes where an earlier row spoke.
    """

    id: str
    severity: Severity
    kind: Kind
    why: str
    fix: str
    source: str
    check: dict[str, Any]
    ops: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    otherwise: bool = False


class Operator(_Row, frozen=True):
    """Operators the consumer runs, with the operand types it takes; see signature.py for the language."""

    ops: tuple[str, ...]
    types: tuple[str, ...]
    source: str
    archs: tuple[str, ...] = ()


class Table(_Row, frozen=True):
    """A consumer: archs give its profiles (`qnn-v75`; without archs its name); `targets` are ours that go to it."""

    name: str
    title: str
    archs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    rule: tuple[Rule, ...] = ()
    operator: tuple[Operator, ...] = ()

    @property
    def profiles(self) -> tuple[str, ...]:
        return tuple(f"{self.name}-{arch}" for arch in self.archs) or (self.name,)

    def types_of(self, op: str) -> tuple[str, ...] | None:
        """Operand types the consumer takes for `op`; None when no row lists it."""
        rows = [row for row in self.operator if op in row.ops]
        return tuple(text for row in rows for text in row.types) if rows else None


def read(text: str, origin: str) -> Table:
    """A table from TOML. Raises TableError that names the row for unknown fields, signatures and archs."""
    try:
        table = msgspec.convert(tomllib.loads(text), Table)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise TableError(f"{origin}: {error}") from error
    ids = [rule.id for rule in table.rule]
    for rule in table.rule:
        if ids.count(rule.id) > 1 or not rule.id.startswith(f"{table.name}/"):
            raise TableError(f"{origin}: rule id {rule.id!r} is taken or does not start with {table.name}/")
    rows: list[tuple[str, Rule | Operator]] = [(rule.id, rule) for rule in table.rule]
    rows += [(", ".join(row.ops), row) for row in table.operator]
    for label, row in rows:
        if unknown := set(row.archs) - set(table.archs):
            raise TableError(f"{origin}: {label}: unknown archs {sorted(unknown)}")
        for types in row.types:
            signature.parse(types)
    return table


@cache
def tables() -> dict[str, Table]:
    """Consumer -> its table, from every file of targets/tables."""
    folder = resources.files("vdq_export.targets") / "tables"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda file: file.name)
    found = [read(file.read_text(encoding="utf-8"), file.name) for file in files]
    return {table.name: table for table in found}


def profiles() -> list[str]:
    """What --for takes."""
    return [profile for table in tables().values() for profile in table.profiles]


def for_profile(profile: str) -> Table:
    """The consumer's table with the rows of this profile only. Raises UnknownNameError with the nearest names."""
    for table in tables().values():
        if profile in table.profiles:
            arch = profile.removeprefix(table.name).lstrip("-")
            return msgspec.structs.replace(
                table, rule=tuple(_of(arch, table.rule)), operator=tuple(_of(arch, table.operator))
            )
    raise UnknownNameError("lint profile", profile, profiles())


def default_profile(target: str, isa: str) -> str:
    """The profile of a bundle made for `target`. Raises VdqError for targets that hand nothing off."""
    for table in tables().values():
        if target in table.targets:
            return f"{table.name}-{isa}" if isa in table.archs else table.profiles[0]
    what = f"no rules for target {target!r}: no compiler of somebody else's reads its graphs"
    raise VdqError(what, hint=f"say --for, one of {', '.join(profiles())}")


def has_rules(target: str) -> bool:
    """Whether a table is for bundles of `target`: none is where no other compiler reads the graphs."""
    return any(target in table.targets for table in tables().values())


def _of(arch: str, rows: tuple[Any, ...]) -> Iterator[Any]:
    return (row for row in rows if not row.archs or arch in row.archs)
