"""What lint found."""

from __future__ import annotations

import msgspec

from vdq_export import jsonfile
from vdq_export.lint.table import Kind, Severity


class _Data(msgspec.Struct, frozen=True, kw_only=True):
    pass


class RuleText(msgspec.Struct, frozen=True):
    """A rule that was asked, as reports print it."""

    id: str
    severity: Severity
    kind: Kind
    why: str
    fix: str
    source: str


class Finding(_Data, frozen=True):
    """One rule broken at one node, in `files`. `module`: the module path in the model, "" when the name has none."""

    rule: str
    severity: Severity
    kind: Kind
    files: tuple[str, ...]
    node: str
    op: str
    module: str
    message: str
    why: str
    fix: str
    source: str


class LintReport(_Data, frozen=True):
    """`graphs`: the files looked at; `rules`: all that were asked, whether they found something or not."""

    profile: str
    consumer: str
    graphs: tuple[str, ...]
    findings: tuple[Finding, ...]
    rules: tuple[RuleText, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity == "warning")

    def to_json(self) -> bytes:
        return jsonfile.encode(self, "lint.json")
