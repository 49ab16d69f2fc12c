"""vdq-export bisect BUNDLE: which layers, in which bins, to put back to float when quality fell."""

from __future__ import annotations

from pathlib import Path

import click

from vdq_export.bisect.back_to_float import CLIPS, RUNS, Found, bisect
from vdq_export.bundle import Bundle
from vdq_export.commands.options import Finite, machine_readable, reporter, verbosity
from vdq_export.commands.outputs import Output
from vdq_export.disk import write_whole

MOST = 0.5  # share of multiply-adds in float beyond which putting layers back is no remedy


@click.command("bisect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--psnr", type=Finite(), metavar="DB", help="The clips' PSNR against float to reach.")
@click.option("--gain", type=Finite(min=0, min_open=True), metavar="DB", help="Or so much more than it has.")
@click.option("--clips", type=click.IntRange(min=1), default=CLIPS, show_default=True, help="Clips to measure on.")
@click.option("--runs", type=click.IntRange(min=1), default=RUNS, show_default=True, help="Most times to make them.")
@click.option("--out", type=Output(".toml"), help="Write the recipe here, a .toml file.")
@click.option("--model", help="The float model; by default the one the bundle names.")
@machine_readable
@verbosity
@click.pass_context
def bisect_command(
    ctx: click.Context,
    bundle: Path,
    psnr: float | None,
    gain: float | None,
    clips: int,
    runs: int,
    out: Path | None,
    model: str | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Find a small set of (layer, bin) that, put back to float, restores a clip PSNR.

    Measured on clips of BUNDLE's own graphs; none of the set can be left out. Says what the fix costs, and writes it
    as a recipe to export with.
    Exit code 1: even with every layer in float the PSNR is not reached.
    """
    if (psnr is None) == (gain is None):
        raise click.UsageError("say one of --psnr and --gain")
    if out is not None and out.suffix != ".toml":
        raise click.UsageError(f"--out {out}: a recipe's name ends in .toml")
    found = bisect(
        Bundle.open(bundle),
        model,
        psnr=psnr,
        gain=gain,
        clips=clips,
        runs=runs,
        reporter=reporter(verbose, quiet),
        out=str(out or "fix.toml"),
    )
    if out is not None and found.recipe:
        write_whole(out, found.recipe.encode())
    click.echo(found.to_json(), nl=False) if as_json else click.echo(_text(found, out))
    if found.outcome == "unreachable":
        ctx.exit(1)


def _text(found: Found, out: Path | None) -> str:
    many = "1 clip" if found.clips == 1 else f"{found.clips} clips"
    lines = [f"bundle: PSNR {found.bundle_db:.2f} dB on {many}, wanted {found.wanted_db:.2f} dB"]
    if found.outcome == "nothing to do":
        return "\n".join([*lines, "nothing has to be put back to float"])
    lines.append(f"with all of {found.candidates} (layer, bin) in float: {found.float_db:.2f} dB")
    if found.outcome == "unreachable":
        lines.append("out of reach: what is lost beyond that is not lost in the linears of the bins' graphs but in")
        lines.append("layers that run ahead, attention in low bits or reused steps; change these, or ask for less")
        return "\n".join([*lines, *filter(None, [found.note])])
    proven = "none can be left out" if found.minimal else "the best so far; more --runs may find fewer"
    lines.append(f"with these {len(found.members)} in float: {found.fixed_db:.2f} dB; {proven}")
    by_layer: dict[str, list[str]] = {}
    for one in found.members:
        by_layer.setdefault(one.layer, []).append(f"bin{one.bin:02d} ({one.share:+.1%})")
    lines += [f"  {layer} in {', '.join(sorted(places))}" for layer, places in by_layer.items()]
    lines.append("  (in brackets: how much of the network's output error in one step goes when it alone is float)")
    lines += _cost(found)
    lines.append(f"searched in {found.runs} runs of {many}, {found.seconds:.0f} s")
    if found.note:
        return "\n".join([*lines, found.note])
    lines.append(f"recipe: {out}" if out else f"recipe (--out writes it):\n{found.recipe.rstrip()}\n")
    lines.append(f"export it: {found.command}")
    return "\n".join(lines)


def _cost(found: Found) -> list[str]:
    cost = found.cost
    assert cost is not None
    bins = ", ".join(f"bin{index:02d}" for index in cost.bins)
    lines = [
        f"costs: weights {cost.bytes / 1e6:+.2f} MB ({cost.share:+.1%} of the bundle); multiply-adds of linears in "
        f"float {cost.float_before:.1%} → {cost.float_after:.1%}; graphs that change: {bins}"
    ]
    if cost.float_after > MOST:
        lines.append("  most of it is float then: a recipe with more bits, or a search for less, may serve better")
    if cost.sessions_after > cost.sessions_before:
        lines.append(
            f"  bins no longer alike: {cost.sessions_after} sessions on the CPU instead of {cost.sessions_before}; on "
            "devices as many programs, whose files come on top of the weights"
        )
    return lines
