"""vdq-export recipes | targets | families: what there is to choose from."""

from __future__ import annotations

from collections import Counter

import click
import msgspec
from rich.console import Console
from rich.table import Table

from vdq_export import recipe, targets
from vdq_export.commands import complete
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
    table = Table("recipe", "what it does", "from", box=None)
    for one in known:
        table.add_row(one.name, one.summary, one.source)
    Console().print(table)


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
    console = Console()
    for spec in specs:
        console.print(f"[bold]{spec.name}[/bold] ({spec.isa}): {spec.summary}")
        table = Table("subject", "supported", "detail", "source", box=None)
        for row in spec.table:
            table.add_row(row.subject, "yes" if row.supported else "no", row.detail, row.source)
        console.print(table)


@click.command("families")
@machine_readable
def families_command(as_json: bool) -> None:
    """List the video transformers of the installed diffusers: how each is supported, and what was tried."""
    known = registry.support()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(known)).decode())
        return
    console = Console(soft_wrap=True, highlight=False)
    for one in known:
        tried = ", exported in the tests" if one.tried else ""
        console.print(f"[bold]{one.name}[/bold]  {one.class_name}: {one.support}{tried}")
        lines = (one.detail, f"published: {', '.join(one.published)}", f"in {', '.join(one.pipelines)}")
        given = (bool(one.detail), bool(one.published), bool(one.pipelines))
        for line in (line for line, is_given in zip(lines, given, strict=True) if is_given):
            console.print(f"    {line}")
    counted = Counter(one.support for one in known)
    console.print(", ".join(f"{count} {support}" for support, count in counted.items()))
