"""vdq-export plan [MODEL]: print what would be done, layer by layer, without quantizing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.padding import Padding
from rich.text import Text

from vdq_export.commands.console import console, table
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
    out = console()
    which = f" ({plan.name})" if plan.name else ""
    out.print(f"{plan.model}{which} for {plan.target}, recipe {plan.recipe.name}; {plan.bins_why}", markup=False)
    for one in plan.bins:
        out.print(
            f"  {one.name}: t {one.t[0]:g} … {one.t[1]:g}, {len(one.steps)} steps, branch {one.branch}", markup=False
        )
    rows = [_row(layer, plan) for layer in plan.layers]
    headings = [heading for heading in (rows[0] if rows else ()) if any(row[heading] for row in rows)]
    if sum(max(len(heading), *(len(row[heading]) for row in rows)) + 2 for heading in headings) > out.width:
        for row in rows:  # a table would cut or break every cell: each layer gets its lines instead
            facts = ", ".join(f"{heading} {row[heading]}" for heading in headings[1:] if row[heading])
            out.print(Text(row["layer"], style="bold"))
            out.print(Padding(Text(facts), (0, 0, 0, 4)))
        return
    shown = table(*headings)
    for row in rows:
        shown.add_row(*(row[heading] for heading in headings))
    out.print(shown, markup=False)


def _row(layer: LayerPlan, plan: QuantPlan) -> dict[str, str]:
    """What the table says of a layer, by column; a column that is empty for all of them is not shown."""
    numbers = [f"{one.scale:.3g}" for one in layer.activation] or [""] * len(layer.float_in)
    whys = layer.float_in or [""] * len(numbers)
    scales = ["float" if why else number for number, why in zip(numbers, whys, strict=True)]
    return {
        "layer": layer.name,
        "K×N": f"{layer.shape[0]}×{layer.shape[1]}",
        "weight": _weight(layer),
        "input": _activation(layer),
        "smoothing": f"α {layer.smoothing.alpha:g}" if layer.smoothing else "",
        "rotation": f"H{layer.rotation.block}" if layer.rotation else "",
        "rank": str(layer.low_rank.rank) if layer.low_rank else "",
        "scale per bin": " ".join(scales),
        "why": _why(layer, plan),
    }


def _why(layer: LayerPlan, plan: QuantPlan) -> str:
    """Why it is in float, everywhere or in some bins; where it is when not in the bins' graphs."""
    if layer.keep_float:
        return layer.keep_float
    bins: dict[str, list[str]] = {}
    for one, why in zip(plan.bins, layer.float_in, strict=False):
        if why:
            bins.setdefault(why, []).append(one.name)
    return "; ".join([*(["runs ahead"] if layer.hoisted else []), *(f"{', '.join(v)}: {k}" for k, v in bins.items())])


def _weight(layer: LayerPlan) -> str:
    weight = layer.weight
    if weight is None:
        return "float"
    blocks = {("e2m1", "e8m0"): "mxfp4", ("e2m1", "e4m3"): "nvfp4", ("e4m3", "e8m0"): "mxfp8", ("e4m3", "float"): "fp8"}
    grid = blocks.get((weight.grid, weight.scales), f"int{weight.bits}")
    return f"{grid}{f' / {weight.group}' if weight.group else ''}{' GPTQ' if weight.codes else ''}"


def _activation(layer: LayerPlan) -> str:
    if layer.activation:
        return "fp8" if layer.activation_dtype.startswith("float8") else f"int{layer.activation_bits}"
    return f"per {layer.dynamic[0].kind}" if layer.dynamic else "float"
