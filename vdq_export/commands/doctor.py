"""vdq-export doctor: versions, instruction set, providers, GPU, toolchains, and what each target could do here."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console
from rich.table import Table

from vdq_export.commands.options import machine_readable
from vdq_export.doctor import Diagnosis, diagnose


@click.command("doctor")
@machine_readable
def doctor_command(as_json: bool) -> None:
    """Tell what this machine has, and what each target could do on it."""
    found = diagnose()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    _print(found, Console(highlight=False))


def _print(found: Diagnosis, console: Console) -> None:
    table = Table("", "", box=None, show_header=False)
    table.add_row("system", f"{found.system}, Python {found.python}")
    table.add_row("processor", f"{found.cores} cores, {found.isa}; {found.memory_gib:g} GiB of memory")
    table.add_row("disk", f"{found.disk_free_gib:g} GiB free in this folder")
    gpus = [f"{one.name} ({one.arch}, {one.memory_gib:g} GiB)" for one in found.gpus]
    table.add_row("GPU", ", ".join(gpus) or "none that torch can use")
    built = f"CUDA {found.cuda}" if found.cuda else "no CUDA"
    table.add_row("", f"torch built with {built}; NVIDIA driver {found.driver or 'not loaded'}")
    table.add_row("onnxruntime", ", ".join(found.providers))
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in found.versions.items() if version))
    table.add_row("not installed", ", ".join(name for name, version in found.versions.items() if not version) or "none")
    table.add_row("programs", ", ".join(name for name, where in found.programs.items() if where) or "none")
    console.print(table)
    console.print()
    table = Table("target", "here", "with", "--isa", "more with", box=None)
    for one in found.targets:
        table.add_row(one.target, one.can, one.detail, " ".join(one.isas), one.missing)
    console.print(table)
