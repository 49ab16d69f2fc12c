"""vdq-export recipes | targets | families: what there is to choose from."""

from __future__ import annotations

from collections import Counter

import click
import msgspec

from vdq_export import recipe, targets
from vdq_export.commands import complete
from vdq_export.commands.console import console, table
from vdq_export.commands.options import machine_readable
from vdq_export.sources import registry


@click.command("recipes")
@machine_readable
def recipes_command(as_json: bool) -> None:
    """List the recipes."""
    known = [recipe.load(name) for name in recipe.names()]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(known)).decode())
        return
    shown = table("recipe", "what it does", "from")
    for one in known:
        shown.add_row(one.name, one.summary, one.source)
    console().print(shown)


@click.command("targets")
@click.argument("name", required=False, shell_complete=complete.target)
@machine_readable
def targets_command(name: str | None, as_json: bool) -> None:
    """List the targets, or one target's capability table."""
    chosen = [targets.load(name)] if name else list(targets.catalogue().values())
    specs = [module.spec() for module in chosen]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(specs)).decode())
        return
    out = console()
    for spec in specs:
        out.print(f"[bold]{spec.name}[/bold] ({spec.isa}): {spec.summary}")
        shown = table("subject", "supported", "detail", "source")
        for row in spec.table:
            shown.add_row(row.subject, "yes" if row.supported else "no", row.detail, row.source)
        out.print(shown)


@click.command("families")
@machine_readable
def families_command(as_json: bool) -> None:
    """List the video transformers of the installed diffusers: how each is supported, and what was tried."""
    known = registry.support()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(known)).decode())
        return
    out = console(soft_wrap=True)
    for one in known:
        tried = ", exported in the tests" if one.tried else ""
        out.print(f"[bold]{one.name}[/bold]  {one.class_name}: {one.support}{tried}")
        lines = (one.detail, f"published: {', '.join(one.published)}", f"in {', '.join(one.pipelines)}")
        given = (bool(one.detail), bool(one.published), bool(one.pipelines))
        for line in (line for line, is_given in zip(lines, given, strict=True) if is_given):
            out.print(f"    {line}")
    counted = Counter(one.support for one in known)
    out.print(", ".join(f"{count} {support}" for support, count in counted.items()))
