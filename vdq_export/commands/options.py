"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vdq_export import sources
from vdq_export.progress import TerminalReporter

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*decorators: Decorator) -> Decorator:
    """Several decorators as one, the first one outermost."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


planning = together(
    click.argument("model", default=sources.DEFAULT),
    click.option(
        "--target", default="ort-int8", show_default=True, help="Deployment target; see `vdq-export targets`."
    ),
    click.option("--isa", help="Instruction set to compile for; by default this machine's."),
    click.option("--tsw", help="Timestep bins (of each expert): a number, `auto` or `all`; by default the recipe's."),
    click.option(
        "--bins", type=click.Choice(["even", "optimal"]), default="even", show_default=True, help="Edges of the bins."
    ),
    click.option(
        "--recipe", default="static-asq", show_default=True, help="Recipe name or TOML file; see `vdq-export recipes`."
    ),
    click.option(
        "--activations",
        type=click.IntRange(min=1),
        help="Bits of activations; by default the target's or the recipe's.",
    ),
    click.option("--budget", metavar="TEXT", help="Search bits per layer: size=4.2bit, bops=32 or quality=35dB."),
    click.option("--save-recipe", type=click.Path(path_type=Path), help="Write the recipe that the search found here."),
    click.option("--workers", type=click.IntRange(min=1), help="Processes that solve layers; by default one a core."),
    click.option("--calibration", type=click.Path(path_type=Path), help="Reuse this calibration record."),
    click.option("--save-calibration", type=click.Path(path_type=Path), help="Keep the calibration record here."),
)
machine_readable = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


verbosity = together(
    click.option("-v", "--verbose", count=True, help="Say what each pass did and skipped."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
)


def reporter(verbose: int, quiet: bool) -> TerminalReporter:
    return TerminalReporter(-1 if quiet else verbose)
