"""vdq-export inspect PATH: what is in an ONNX file or a bundle."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from vdq_export import pipeline, targets
from vdq_export.commands.console import console, table
from vdq_export.commands.options import bundle_argument
from vdq_export.commands.outputs import Output
from vdq_export.disk import write_whole
from vdq_export.inspect import AheadSummary, GraphSummary, Summary, summarize
from vdq_export.manifest import MANIFEST

_BEHIND = (*pipeline.FLOAT, *pipeline.SHARED, *pipeline.PER_BIN)
WIDEST = 5  # activation scales shown of those that vary most over the bins


@click.command("inspect")
@bundle_argument("path")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option("--html", type=Output(".html"), help="Draw a block into this file instead.")
@click.option("--block", metavar="NAME", help="Module to draw, such as blocks.0 or blocks.0.attn1; default: the first.")
def inspect_command(path: Path, as_json: bool, html: Path | None, block: str | None) -> None:
    """Summarise an ONNX file or a bundle: operators, inputs and outputs, sizes, linears quantized, scales per bin.

    With --html one block is drawn as a page. Of the folder that `--dump-after all` wrote it is drawn before and after
    each pass, with what changed.
    """
    if html is not None:
        _draw(path, html, block)
        return
    if block is not None:
        raise click.UsageError("--block is for the page: give --html FILE")
    summary = summarize(path)
    if as_json:
        click.echo(summary.to_json().decode(), nl=False)
    else:
        print_summary(summary, console())


def _draw(path: Path, html: Path, block: str | None) -> None:
    from vdq_export.report.graph_page import graph_page, passes_page

    dumps = [] if (path / MANIFEST).is_file() else dumped(path)
    write_whole(html, passes_page(path, dumps, block) if dumps else graph_page(path, block))
    click.echo(f"{html}: open it in a browser")


def dumped(folder: Path) -> list[tuple[str, Path]]:
    """(pass, file) of what `--dump-after` wrote, in the order of the passes; of several graphs the first's."""
    found = {file.stem: file for file in folder.glob("*.onnx")}
    orders = [(*pipeline.canonical(name), *_BEHIND, *module.PASSES) for name, module in targets.catalogue().items()]
    order = max(orders, key=lambda one: len(found.keys() & set(one)))  # of the target that it was made for
    # Between the passes of the network and those of its bins, hoisting takes out what no step changes.
    first = pipeline.SHARED[0]
    return [(f"hoisting, {name}" if name == first else name, found[name]) for name in order if name in found]


def print_summary(summary: Summary, out: Console) -> None:
    made = [text for text in (summary.model, summary.target, summary.recipe) if text]
    title = f"{summary.path}: {summary.what}, {_bytes(summary.size)}"
    out.print(title + (f" ({', '.join(made)})" if made else ""), markup=False, highlight=False)
    shown = table("", *(graph.name for graph in summary.graphs))
    for label, row in _rows(summary.graphs):
        shown.add_row(label, *row)
    out.print(shown, markup=False)
    for parts in summary.ahead:
        out.print(_ahead(parts), markup=False, highlight=False)
    if summary.scales:
        ratios = [one.ratio for one in summary.scales]
        middle = sorted(ratios)[len(ratios) // 2]
        out.print(f"activation scales over the bins: max/min {middle:.2f} (median), {ratios[0]:.2f} (largest)")
        for one in summary.scales[:WIDEST]:
            values = " ".join(f"{scale:.3g}" for scale in one.scales)
            out.print(f"  {one.where}: {values} (×{one.ratio:.2f})", markup=False, highlight=False)


def _ahead(one: AheadSummary) -> str:
    parts = list(one.graphs)
    if one.tables:
        parts.append(f"{one.tables} ({one.rows} rows of {one.values} values, {_bytes(one.table_bytes)})")
    return f"ahead of {', '.join(f'bin{index:02d}' for index in one.bins)}: {', '.join(parts)}"


def _rows(graphs: tuple[GraphSummary, ...]) -> list[tuple[str, list[str]]]:
    rows = [
        ("inputs", ["\n".join(f"{k} {v}" for k, v in g.inputs.items()) for g in graphs]),
        ("outputs", ["\n".join(f"{k} {v}" for k, v in g.outputs.items()) for g in graphs]),
        ("opset", [", ".join(f"{k} {v}" for k, v in g.opsets.items()) for g in graphs]),
        ("linears quantized", [f"{g.linears_quantized} of {g.linears}" for g in graphs]),
    ]
    dtypes = dict.fromkeys(dtype for g in graphs for dtype in g.param_bytes)
    rows += [(f"{dtype} parameters", [_bytes(g.param_bytes.get(dtype, 0)) for g in graphs]) for dtype in dtypes]
    types = dict.fromkeys(kind for g in graphs for kind in g.ops)
    return rows + [(kind, [str(g.ops.get(kind, "")) for g in graphs]) for kind in types]


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
