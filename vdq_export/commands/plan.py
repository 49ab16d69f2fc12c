"""vdq-export plan [MODEL]: print what would be done, layer by layer, without quantizing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vdq_export import compiler
from vdq_export.bundle import Bundle
from vdq_export.commands.options import machine_readable, planning, reporter, verbosity
from vdq_export.errors import BundleError
from vdq_export.plan import LayerPlan, QuantPlan


@click.command("plan")
@planning
@machine_readable
@verbosity
def plan_command(model: str, bins: str, as_json: bool, verbose: int, quiet: bool, **choices: Any) -> None:
    """Print the quantization plan of MODEL (or of a bundle folder)."""
    if Path(model, "manifest.json").is_file():
        plan = Bundle.open(model).plan
    else:
        planned = compiler.make_plan(
            model, optimal_bins=bins == "optimal", reporter=reporter(verbose, quiet), **choices
        )
        plan = planned.plan
    if plan is None:
        raise BundleError(f"{model} carries no plan.json", hint="export it again")
    if as_json:
        click.echo(plan.to_json(), nl=False)
    else:
        print_plan(plan)


def print_plan(plan: QuantPlan) -> None:
    console = Console()
    console.print(f"{plan.model} for {plan.target}, recipe {plan.recipe.name}; {plan.bins_why}", markup=False)
    for one in plan.bins:
        console.print(
            f"  {one.name}: t {one.t[0]:g} … {one.t[1]:g}, {len(one.steps)} steps, branch {one.branch}", markup=False
        )
    table = Table("layer", "K × N", "weight", "activation", "smoothing", "scale per bin", box=None)
    for layer in plan.layers:
        table.add_row(*_row(layer))
    console.print(table, markup=False)


def _row(layer: LayerPlan) -> tuple[str, ...]:
    size = f"{layer.shape[0]} × {layer.shape[1]}"
    if layer.weight is None:
        return layer.name, size, "float", "float", "", layer.keep_float
    smoothing = f"α {layer.smoothing.alpha:g}" if layer.smoothing else "none"
    scales = " ".join(f"{one.scale:.3g}" for one in layer.activation)
    return layer.name, size, layer.weight.dtype, layer.activation_dtype, smoothing, scales
