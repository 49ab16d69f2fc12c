"""vdq-export doctor: versions, instruction set, providers, GPU, toolchains, and what each target could do here."""

from __future__ import annotations

import click
import msgspec
from rich.console import Console

from vdq_export.commands.console import console, table
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
    _print(found, console())


def _print(found: Diagnosis, out: Console) -> None:
    shown = table("", "", show_header=False)
    shown.add_row("system", f"{found.system}, Python {found.python}")
    shown.add_row("processor", f"{found.cores} cores, {found.isa}; {found.memory_gib:g} GiB of memory")
    shown.add_row("disk", f"{found.disk_free_gib:g} GiB free in this folder")
    gpus = [f"{one.name} ({one.arch}, {one.memory_gib:g} GiB)" for one in found.gpus]
    shown.add_row("GPU", ", ".join(gpus) or "none that torch can use")
    built = f"CUDA {found.cuda}" if found.cuda else "no CUDA"
    shown.add_row("", f"torch built with {built}; NVIDIA driver {found.driver or 'not loaded'}")
    shown.add_row("onnxruntime", ", ".join(found.providers))
    shown.add_row("packages", ", ".join(f"{name} {version}" for name, version in found.versions.items() if version))
    shown.add_row("not installed", ", ".join(name for name, version in found.versions.items() if not version) or "none")
    shown.add_row("programs", ", ".join(name for name, where in found.programs.items() if where) or "none")
    out.print(shown)
    out.print()
    shown = table("target", "here", "with", "--isa", "more with")
    for one in found.targets:
        shown.add_row(one.target, one.can, one.detail, " ".join(one.isas), one.missing)
    out.print(shown)
