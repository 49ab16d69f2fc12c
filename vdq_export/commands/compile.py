"""vdq-export compile BUNDLE --arch v75: context binaries for Hexagon NPUs, added to the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vdq_export.bundle import Bundle
from vdq_export.commands import complete
from vdq_export.commands.options import NumberOr, bundle_argument, machine_readable, reporter, verbosity
from vdq_export.targets.qnn.contexts import SOCS, CompileReport, compile_bundle


@click.command("compile")
@bundle_argument()
@click.option(
    "--arch",
    "archs",
    multiple=True,
    required=True,
    shell_complete=complete.of(lambda: SOCS),
    help=f"HTP architecture, may be repeated: {', '.join(f'{a} ({s.product})' for a, s in SOCS.items())}.",
)
@click.option(
    "--shared/--unshared", default=True, show_default=True, help="All bins in one binary, their weights once."
)
@click.option(
    "--parts",
    type=NumberOr("auto"),
    default=1,
    show_default=True,
    help="Contexts to cut each graph into; auto: the fewest.",
)
@click.option("--force", is_flag=True, help="Replace contexts that the bundle has already.")
@machine_readable
@verbosity
def compile_command(
    bundle: Path,
    archs: tuple[str, ...],
    shared: bool,
    parts: Any,
    force: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compile the graphs of BUNDLE (made with --target qnn) offline and add the context binaries to it.

    Needs onnxruntime-qnn: pip install 'vdq-export[qnn]'.
    """
    opened = Bundle.open(bundle)
    tell = reporter(verbose, quiet)
    _, report = compile_bundle(opened, archs, shared=shared, parts=parts, force=force, reporter=tell)
    click.echo(report.to_json(), nl=False) if as_json else click.echo(_text(report, archs))


def _text(report: CompileReport, archs: tuple[str, ...]) -> str:
    lines = []
    for one in (found for found in report.contexts if found.arch in archs):
        lines.append(
            f"{one.arch} ({one.soc}): {len(one.graphs)} graphs, {sum(g.nodes for g in one.graphs)} nodes, all on the "
            f"HTP; {one.binary_bytes / 1e6:.2f} MB{' shared' if one.shared else ''} in {one.seconds:.1f} s, "
            f"{one.peak_memory_bytes / 2**20:.0f} MiB of memory"
        )
        for graph in one.graphs:
            spill = sum(graph.spill_fill_bytes)
            cut = f", {len(graph.binaries)} parts" if len(graph.binaries) > 1 else ""
            lines.append(f"  {graph.model}: {graph.seconds:.1f} s, spills {spill / 2**20:.1f} MiB{cut}")
    return "\n".join(lines)
