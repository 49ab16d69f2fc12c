"""vdq-export record PATH: run a diffusers folder once a prompt and keep every call of its transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from vdq_export.commands.options import loop, machine_readable, reporter, verbosity
from vdq_export.commands.outputs import Output
from vdq_export.recording import Cost, record


@click.command("record")
@click.argument("path", type=click.Path(exists=True, file_okay=False))
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts, one a line.")
@click.option("--out", type=Output(), default=Path("traj"), show_default=True, help="Folder to write into.")
@loop
@machine_readable
@verbosity
def record_command(
    path: str, prompts: Path | None, out: Path, as_json: bool, verbose: int, quiet: bool, **options: Any
) -> None:
    """Run the pipeline in PATH for each prompt and keep what its transformer is called with.

    `vdq-export PATH --trajectories OUT` then calibrates on it, on a machine without text encoder. Started again after
    an interruption, it goes on where it stopped.
    """
    cost = record(path, out, prompts=prompts, reporter=reporter(verbose, quiet), **options)
    click.echo(msgspec.json.encode(cost).decode() if as_json else _text(cost))


def _text(cost: Cost) -> str:
    there = f" ({cost.prompts - cost.made} were there)" if cost.made < cost.prompts else ""
    each = f", {cost.denoising_s / cost.calls:.2f} s each" if cost.calls else ""
    return (
        f"{cost.out}: {cost.made} trajectories{there}; text {cost.text_s:.1f} s, "
        f"{cost.calls} calls of the transformer in {cost.denoising_s:.1f} s{each}, {cost.bytes / 1e6:.1f} MB"
    )
