"""Lint: every rule of a table over every graph; what several graphs have in common is one finding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from vdq_export.bundle import Bundle
from vdq_export.graph import Graph
from vdq_export.lint import checks, table
from vdq_export.lint.report import Finding, LintReport, RuleText
from vdq_export.lint.view import View


def lint_graphs(graphs: Mapping[str, Graph], profile: str) -> LintReport:
    """Findings of the rules of `profile` ("qnn-v75") over graphs by file name.

    Raises UnknownNameError for a profile that there is not.
    """
    consumer = table.for_profile(profile)
    asked = [(rule, checks.of_rule(rule)) for rule in consumer.rule]
    where: dict[tuple[str, checks.Hit], list[str]] = {}
    for label, graph in graphs.items():
        view = View(graph)
        spoken: set[str] = set()  # nodes with a finding of their own
        for rule, check in asked:
            units = [unit for unit in view.units if checks.matches(rule, unit)]
            hits = list(check.find(checks.Scope(view, consumer, units)))
            hits = [hit for hit in hits if not (rule.otherwise and hit.node in spoken)]
            spoken.update(hit.node for hit in hits)
            for hit in hits:
                files = where.setdefault((rule.id, hit), [])
                if label not in files:
                    files.append(label)
    rules = {rule.id: rule for rule in consumer.rule}
    return LintReport(
        profile=profile,
        consumer=consumer.title,
        graphs=tuple(graphs),
        findings=tuple(_sorted(_finding(rules[rule_id], hit, files) for (rule_id, hit), files in where.items())),
        rules=tuple(RuleText(r.id, r.severity, r.kind, r.why, r.fix, r.source) for r in consumer.rule),
    )


def lint_file(path: Path, profile: str) -> LintReport:
    """Lint one .onnx file. Raises VdqError for what is none."""
    return lint_graphs({path.name: Graph.load(path)}, profile)


def lint_bundle(bundle: Bundle, profile: str | None = None) -> LintReport:
    """Lint the graphs of a bundle that go to the consumer; the bundle's target says which one, unless `profile` does.

    Those are the bins'. What runs ahead of them (prompt, step, probes) runs on the CPU.
    """
    chosen = profile or table.default_profile(bundle.manifest.target, bundle.manifest.isa)
    paths = dict.fromkeys(one.graph for one in bundle.schedule.bins)
    return lint_graphs({path: Graph.load(bundle.path / path) for path in paths}, chosen)


def _finding(rule: table.Rule, hit: checks.Hit, files: list[str]) -> Finding:
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        kind=rule.kind,
        files=tuple(files),
        node=hit.node,
        op=hit.op,
        module=hit.node.rpartition("/")[0],
        message=hit.message,
        why=rule.why,
        fix=rule.fix,
        source=rule.source,
    )


def _sorted(findings: Iterator[Finding]) -> list[Finding]:
    """Errors first; then in the order found."""
    return sorted(findings, key=lambda one: one.severity != "error")
