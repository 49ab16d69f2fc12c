"""vdq-export verify BUNDLE: measure a bundle against its float model; exit 1 when a threshold is missed."""

from __future__ import annotations

from pathlib import Path

import click

from vdq_export.bundle import Bundle
from vdq_export.commands.options import machine_readable, reporter, verbosity
from vdq_export.report.data import VerifyReport
from vdq_export.verify import verify


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The float model; by default the one the bundle names.")
@click.option("--clips", type=click.IntRange(min=0), default=20, show_default=True, help="Whole clips to compare.")
@click.option("--save", is_flag=True, help="Keep the result in the bundle as report/report.json.")
@machine_readable
@verbosity
@click.pass_context
def verify_command(
    ctx: click.Context,
    bundle: Path,
    model: str | None,
    clips: int,
    save: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compare BUNDLE with its float model, per layer, per bin and on whole clips."""
    opened = Bundle.open(bundle)
    report = verify(opened, model, clips=clips, reporter=reporter(verbose, quiet))
    if save:
        opened.attach("report/report.json", report.to_json())
    click.echo(report.to_json(), nl=False) if as_json else click.echo(_text(report))
    if report.verdict == "fail":
        ctx.exit(1)


def _text(report: VerifyReport) -> str:
    kernels = report.integer_kernels
    lines = [f"verdict: {report.verdict}"]
    if report.psnr_db is not None:
        lines.append(f"clips against float: PSNR {report.psnr_db:.2f} dB")
    if report.judge is not None:
        scores = (f"{k} {v:.0%} → {report.judge.quantized[k]:.0%}" for k, v in report.judge.float_.items())
        lines.append(f"judge, float → bundle: {', '.join(scores)}")
    lines.append(f"integer kernels: {kernels.executed} of {kernels.planned} planned")
    lines.append("weakest layers (SQNR):")
    for quality in sorted(report.layers, key=lambda q: q.sqnr_db)[:5]:
        lines.append(
            f"  {quality.sqnr_db:6.1f} dB  {quality.layer} in bin{quality.bin:02d}, worst at t={quality.worst_step:g}"
        )
    lines.append(f"bundle: {report.bundle_bytes / 1e6:.2f} MB")
    lines += [f"failed: {line}" for line in report.failures]
    return "\n".join(lines)
