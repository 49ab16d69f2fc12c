"""vdq-export plan [MODEL]: print what would be done, layer by layer, without quantizing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from vdq_export.commands.options import machine_readable, planning, reporter, verbosity
from vdq_export.errors import BundleError
from vdq_export.plan import LayerPlan, QuantPlan


@click.command("plan")
@planning
@machine_readable
@verbosity
def plan_command(
    model: str,
    bins: str,
    engine: str,
    work: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **choices: Any,
) -> None:
    """Print the quantization plan of MODEL (or of a bundle folder)."""
    from vdq_export import compiler  # with torch: --help and completion do without
    from vdq_export.bundle import Bundle
    from vdq_export.commands.search import resolve
    from vdq_export.work.place import at_work

    if Path(model, "manifest.json").is_file():
        plans = Bundle.open(model).plans
    else:
        told = reporter(verbose, quiet)
        with at_work(work=work, engine=engine, workers=choices["workers"]) as place:
            asked = {**choices, "work": place, "optimal_bins": bins == "optimal"}
            choices, _ = resolve(model, asked, told)
            plans = compiler.make_plan(model, reporter=told, **choices).plans
    if not plans:
        raise BundleError(f"{model} carries no plan", hint="export it again")
    if as_json:
        whole = plans[0].to_json() if len(plans) == 1 else b"[" + b",".join(p.to_json() for p in plans) + b"]\n"
        click.echo(whole, nl=False)
        return
    for plan in plans:
        print_plan(plan)


def print_plan(plan: QuantPlan) -> None:
    console = Console()
    which = f" ({plan.name})" if plan.name else ""
    console.print(f"{plan.model}{which} for {plan.target}, recipe {plan.recipe.name}; {plan.bins_why}", markup=False)
    for one in plan.bins:
        console.print(
            f"  {one.name}: t {one.t[0]:g} … {one.t[1]:g}, {len(one.steps)} steps, branch {one.branch}", markup=False
        )
    table = Table("layer", "K × N", "weight", "activation", "smoothing", "rotation", "rank", "scale per bin", box=None)
    for layer in plan.layers:
        table.add_row(*_row(layer))
    console.print(table, markup=False)


def _row(layer: LayerPlan) -> tuple[str, ...]:
    size = f"{layer.shape[0]} × {layer.shape[1]}"
    weight = layer.weight
    if weight is None:
        return layer.name, size, "float", "float", "", "", "", layer.keep_float
    groups = f" / {weight.group}" if weight.group else ""
    grid = f"{'mxfp' if weight.grid == 'e2m1' else 'int'}{weight.bits}{groups}{' GPTQ' if weight.codes else ''}"
    scales = " ".join(f"{one.scale:.3g}" for one in layer.activation)
    return (
        layer.name,
        size,
        grid,
        _activation(layer),
        f"α {layer.smoothing.alpha:g}" if layer.smoothing else "none",
        f"H{layer.rotation.block}" if layer.rotation else "none",
        str(layer.low_rank.rank) if layer.low_rank else "",
        scales,
    )


def _activation(layer: LayerPlan) -> str:
    if layer.activation:
        return f"int{layer.activation_bits}"
    return f"per {layer.dynamic[0].kind}" if layer.dynamic else "float"
