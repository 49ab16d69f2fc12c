"""vdq-export lint PATH: will the consumer of a hand-off take it? Exit 1 when something must be changed first."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from vdq_export.bundle import Bundle, is_bundle
from vdq_export.commands import complete
from vdq_export.commands.console import console
from vdq_export.commands.options import bundle_argument, machine_readable
from vdq_export.commands.outputs import Output
from vdq_export.disk import write_whole
from vdq_export.errors import VdqError
from vdq_export.lint import LintReport, lint_bundle, lint_file
from vdq_export.lint.report import Finding
from vdq_export.lint.sarif import to_sarif
from vdq_export.lint.table import profiles

NODES = 6  # shown of those that break one rule


@click.command("lint")
@bundle_argument("path")
@click.option(
    "--for",
    "profile",
    shell_complete=complete.of(profiles),
    help="Consumer, such as qnn-v75; by default the one the bundle was made for.",
)
@click.option("--sarif", type=Output(".sarif", ".json"), help="Also write SARIF 2.1.0 here.")
@machine_readable
@click.pass_context
def lint_command(ctx: click.Context, path: Path, profile: str | None, sarif: Path | None, as_json: bool) -> None:
    """Check PATH, a bundle or an .onnx file, against what its consumer takes, without the consumer's tools."""
    report = lint(path, profile)
    if sarif:
        write_whole(sarif, to_sarif(report))
    click.echo(report.to_json(), nl=False) if as_json else print_report(report, console())
    if report.errors:
        ctx.exit(1)


def lint(path: Path, profile: str | None) -> LintReport:
    """Raises VdqError for what is neither a bundle nor a readable .onnx file, and for unknown profiles."""
    if not path.exists():
        raise VdqError(f"{path}: no such file or folder", hint="give a bundle or an .onnx file")
    if is_bundle(path) or path.is_dir():
        return lint_bundle(Bundle.open(path, verify_hashes=False), profile)
    if profile is None:
        raise click.UsageError("an .onnx file does not say who takes it: give --for, such as --for qnn-v75")
    return lint_file(path, profile)


def print_report(report: LintReport, out: Console) -> None:
    """Rule by rule: where, why, what to change, how we know."""
    groups: dict[str, list[Finding]] = {}
    for finding in report.findings:
        groups.setdefault(finding.rule, []).append(finding)
    for found in groups.values():
        _print_group(found, out)
    counts = f"{_count(len(report.errors), 'error')}, {_count(len(report.warnings), 'warning')}"
    where = f"in {_count(len(report.graphs), 'graph')} for {report.profile} ({report.consumer})"
    out.print(f"{counts} {where}", markup=False, highlight=False)


def _print_group(found: list[Finding], out: Console) -> None:
    first = found[0]
    title = f"{first.severity} {first.rule} ({first.kind}), {_count(len(found), 'finding')}"
    out.print(title, style="bold red" if first.severity == "error" else "bold yellow", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    files = sorted({file for one in found for file in one.files})
    rows = [(one.node or "the graph", one.message) for one in found[:NODES]]
    for label, text in rows:
        table.add_row("at", f"{label}: {text}")
    if len(found) > NODES:
        table.add_row("", f"… and {len(found) - NODES} more, see --json")
    for label, text in (("in", ", ".join(files)), ("why", first.why), ("do", first.fix), ("from", first.source)):
        table.add_row(label, text)
    out.print(table, markup=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
