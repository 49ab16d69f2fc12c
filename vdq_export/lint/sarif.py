"""A lint report as SARIF 2.1.0 (OASIS standard): the form that code hosts and editors show beside the file."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import msgspec

from vdq_export.lint.report import Finding, LintReport, RuleText

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def to_sarif(report: LintReport) -> bytes:
    """One run; nodes are logical locations, since an ONNX file has no lines."""
    index = {rule.id: number for number, rule in enumerate(report.rules)}
    driver = {
        "name": "vdq-export lint",
        "version": metadata.version("vdq-export"),
        "rules": [_rule(rule) for rule in report.rules],
    }
    run = {
        "tool": {"driver": driver},
        "artifacts": [{"location": {"uri": graph}} for graph in report.graphs],
        "results": [_result(finding, index[finding.rule]) for finding in report.findings],
        "properties": {"profile": report.profile, "consumer": report.consumer},
    }
    text = msgspec.json.encode({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})
    return msgspec.json.format(text, indent=1) + b"\n"


def _rule(rule: RuleText) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.why},
        "help": {"text": f"{rule.fix}\nSource: {rule.source}"},
        "defaultConfiguration": {"level": rule.severity},
        "properties": {"kind": rule.kind, "source": rule.source},
    }


def _result(finding: Finding, rule: int) -> dict[str, Any]:
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": f"{finding.message}. {finding.why} To mend it: {finding.fix}"},
        "locations": [_location(finding, file) for file in finding.files],
        "properties": {"kind": finding.kind},
    }


def _location(finding: Finding, file: str) -> dict[str, Any]:
    place: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": file}}}
    if finding.node:
        node = {"name": finding.node.rpartition("/")[2], "fullyQualifiedName": finding.node, "kind": "element"}
        place["logicalLocations"] = [node]
    return place
