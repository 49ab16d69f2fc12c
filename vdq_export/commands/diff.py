"""vdq-export diff A B: what differs between two graphs or two bundles."""

from __future__ import annotations

from pathlib import Path

import click

from vdq_export.commands.options import bundle_argument
from vdq_export.commands.outputs import Output
from vdq_export.diff.compare import diff
from vdq_export.diff.text import render
from vdq_export.disk import write_whole


@click.command("diff")
@bundle_argument("a")
@bundle_argument("b")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--html", type=Output(".html"), help="Also write a page: both side by side.")
@click.option("--block", metavar="NAME", help="Draw this block there, such as blocks.0; by default those that changed.")
@click.pass_context
def diff_command(context: click.Context, a: Path, b: Path, as_json: bool, html: Path | None, block: str | None) -> None:
    """Compare two ONNX files, or two bundles: operators added, removed, rewired, retyped, parameters changed.

    Weights compare by hash, and renaming is no difference. Exit code 0: same, 1: different, 2: cannot be compared.
    """
    if block is not None and html is None:
        raise click.UsageError("--block is for the page: give --html FILE")
    difference = diff(a, b)
    if html is not None:
        from vdq_export.report.graph_page import diff_page

        write_whole(html, diff_page(a, b, block))
    click.echo(difference.to_json().decode() if as_json else render(difference), nl=False)
    if not difference.same:
        context.exit(1)
