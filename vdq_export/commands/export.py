"""vdq-export [MODEL]: compile a model into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from vdq_export.commands import complete
from vdq_export.commands.console import console
from vdq_export.commands.options import machine_readable, planning, reporter, verbosity
from vdq_export.commands.outputs import Output

if TYPE_CHECKING:
    from vdq_export.bundle import Bundle


@click.command("export")
@planning
@click.option("--out", type=Output(), default=Path("bundle"), show_default=True, help="Bundle folder to write.")
@click.option("--force", is_flag=True, help="Replace a bundle at --out (never anything else).")
@click.option("--strict", is_flag=True, help="Fail when a pass skips a planned edit.")
@click.option(
    "--dump-after",
    metavar="PASS",
    shell_complete=complete.passes,
    help="Also write the graph after this pass (or `all`) beside the bundle.",
)
@machine_readable
@verbosity
def export_command(
    model: str,
    bins: str,
    out: Path,
    engine: str,
    work: Path | None,
    dump_after: str | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **choices: Any,
) -> None:
    """Compile MODEL for a target and write a bundle.

    An export that was cut short goes on where it was when it is started again: finished work is kept in OUT.work until
    the bundle is written.
    """
    from vdq_export import compiler, pipeline  # with torch: --help and completion do without
    from vdq_export.commands.search import resolve
    from vdq_export.work.place import at_work

    dump = None if dump_after is None else pipeline.dump_to(out.with_name(f"{out.name}.passes"), dump_after)
    told = reporter(verbose, quiet)
    try:
        with at_work(out, work=work, engine=engine, workers=choices["workers"]) as place:
            asked = {**choices, "work": place, "optimal_bins": bins == "optimal"}
            choices, found = resolve(model, asked, told)
            bundle = compiler.export(model, out=out, dump=dump, reporter=told, **choices)
    except KeyboardInterrupt as stopped:
        kept = work or out.with_name(f"{out.name}.work")
        stopped.add_note("no bundle was written")
        if kept.is_dir():
            stopped.add_note(f"the same command goes on from {kept}")
        raise
    if as_json:
        searched = {"search": found.builtins()} if found else {}
        click.echo(msgspec.json.encode(_summary(bundle) | searched).decode())
        return
    if found:
        console().print(found.table())
        click.echo(found.text())
    click.echo(_text(bundle))


def _summary(bundle: Bundle) -> dict[str, Any]:
    first = bundle.plans[0]
    layers = [layer for plan in bundle.plans if plan.precision in ("", "low") for layer in plan.layers]
    return {
        "bundle": str(bundle.path),
        "bytes": bundle.size,
        "weight_bytes": sum(e.size for e in bundle.manifest.files if e.path.endswith("/weights.bin")),
        "model": bundle.manifest.model.name,
        "target": first.target,
        "isa": bundle.manifest.isa,
        "recipe": first.recipe.name,
        "bins": [
            {"t": b.t, "branch": b.branch, "steps": len(b.steps), "expert": plan.expert, "precision": plan.precision}
            for plan in bundle.plans
            for b in plan.bins
        ],
        "layers": {
            "quantized": sum(x.quantized for x in layers),
            "float": sum(not x.quantized for x in layers),
            "float_in_bins": sum(bool(why) for x in layers for why in x.float_in),
        },
    }


def _text(bundle: Bundle) -> str:
    facts = _summary(bundle)
    layers = facts["layers"]
    some = f" and {layers['float_in_bins']} (layer, bin)" if layers["float_in_bins"] else ""
    return (
        f"{facts['bundle']}: {facts['model']} for {facts['target']} ({facts['isa']}), recipe {facts['recipe']}, "
        f"{len(facts['bins'])} bins, {layers['quantized']} layers quantized, {layers['float']}{some} in float, "
        f"{facts['bytes'] / 1e6:.1f} MB, {facts['weight_bytes'] / 1e6:.1f} MB of them weights"
    )
