"""vdq-export recipes | targets | families: what there is to choose from."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.table import Table

from vdq_export import families, recipe, targets
from vdq_export.commands.options import machine_readable


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
@click.argument("name", required=False)
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
    """List the video transformers of the installed diffusers and what is known of each."""
    known = families.support()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(known)).decode())
        return
    table = Table("family", "class in diffusers", "support", "tried", "detail", "published", box=None)
    for one in known:
        tried = "yes" if one.tried else "no"
        table.add_row(one.name, one.class_name, one.support, tried, one.detail, ", ".join(one.published))
    Console().print(table)
