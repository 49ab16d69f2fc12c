"""The plots of the report page, by Bokeh: as JSON that its JavaScript draws.

Drawn for light paper; the page's style sheet inverts their lightness where the reader wants it dark. So colours that
mean something are of middle lightness and differ in hue: they keep their meaning and their distance from the paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.core.json_encoder import serialize_json
from bokeh.document import Document
from bokeh.model import Model
from bokeh.models import (
    Axis,
    BasicTicker,
    CategoricalAxis,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    CustomJSTickFormatter,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    Range1d,
    TapTool,
)
from bokeh.palettes import interp_palette
from bokeh.plotting import figure

from vdq_export.report.cells import REPEATED, Cell, columns
from vdq_export.report.data import StepError

INK, PAPER, UNKNOWN = "#33373d", "#ffffff", "#d7dade"
BLUE, ORANGE, GREEN = "#1f6fb2", "#d1690e", "#2b8a3e"
# Below the threshold red, above it from orange over yellow to blue; colour-blind people see them apart.
LOW, HIGH = ("#a01f52", "#d0404a"), ("#e07b39", "#e2b83c", "#9dbf8f", "#5aa3c4", "#3d78b8")
BELOW_DB, ABOVE_DB, A_COLOUR_DB = 10, 40, 1  # span of the colours from the threshold, alike in all reports
ROW, LABELLED, THINNEST = 16, 13, 4  # pixels of a row: at most, where every row has its label, at least
TALLEST = 4800  # pixels of the cells: phones draw no larger canvas
TALL = 1200  # above that the bins are named below too


def to_json(figures: Mapping[str, Model]) -> str:
    """{name: what Bokeh.embed.embed_item takes, less its target_id}, safe inside a <script>; equal for equal plots."""
    items = []
    for name, model in figures.items():
        document = Document()
        document.add_root(model)
        whole: Any = document.to_json(deferred=False)
        version = whole["version"]
        text = serialize_json({"root_id": model.id, "doc": whole, "version": version})
        items.append(f"{serialize_json(name)}:{_renumbered(text, name)}")
    return "{" + ",".join(items).replace("<", "\\u003c") + "}"


def _renumbered(text: str, prefix: str) -> str:
    """Bokeh counts its models over the whole process; here they are counted over one plot."""
    numbers: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        number = numbers.setdefault(match[2], f"{prefix}-{len(numbers)}")
        return f'"{match[1]}":"{number}"'

    return re.sub(r'"(id|root_id)":"(p\d+)"', renamed, text)


def heat_map(cells: Sequence[Cell], threshold_db: float, spans: Mapping[str, str]) -> Model:
    """Layer × bin, coloured by SQNR; a cross where it misses the threshold. A tap calls the page's showCell().

    spans: by bin what it serves, in few letters. The colours are fixed to the threshold: one broken layer would
    otherwise take all of them for itself.
    """
    layers = list(dict.fromkeys(one.layer for one in cells))
    bins = list(dict.fromkeys(one.bin for one in cells))
    data, texts = columns(cells)
    source, told = ColumnDataSource(data), ColumnDataSource({"text": texts})
    source.data["sqnr_db"] = [float("nan") if one.sqnr_db is None else one.sqnr_db for one in cells]
    source.data["mark"] = ["×" if one.state == "low" else "" for one in cells]
    row = max(THINNEST, min(ROW, TALLEST // max(len(layers), 1)))
    plot = _figure(
        x_range=FactorRange(*bins),
        y_range=FactorRange(*reversed(layers)),
        height=120 + row * len(layers),
        x_axis_location="above",
    )
    plot.name = "heat"
    low, high = (interp_palette(ends, db // A_COLOUR_DB) for ends, db in ((LOW, BELOW_DB), (HIGH, ABOVE_DB)))
    colours = LinearColorMapper(
        palette=(*low, *high), low=threshold_db - BELOW_DB, high=threshold_db + ABOVE_DB, nan_color=UNKNOWN
    )
    drawn = plot.rect(
        "bin",
        "layer",
        width=1,
        height=1,
        source=source,
        fill_color={"field": "sqnr_db", "transform": colours},
        line_color=PAPER,
        nonselection_fill_alpha=1.0,
        selection_line_color=INK,
    )
    plot.text("bin", "layer", text="mark", source=source, text_align="center", text_baseline="middle", text_color=PAPER)
    rows = [("layer", "@layer"), ("bin", "@bin: @when{custom}"), ("SQNR", "@sqnr @worst{custom}")]
    rows += [(name, f"@{name}{{custom}}") for name in ("numbers", "range", "clip", "alpha", "rank")]
    rows += [("folded", "@place{custom}"), ("why", "@why{custom}")]
    by_number = CustomJSHover(args={"told": told}, code="return told.data.text[value]")
    tip = HoverTool(renderers=[drawn], tooltips=rows, attachment="vertical")
    tip.formatters = {f"@{name}": by_number for name in REPEATED}
    plot.add_tools(tip, TapTool(renderers=[drawn]))
    code = "showCell(source.data, told.data.text, this.indices)"
    source.selected.js_on_change("indices", CustomJS(args={"source": source, "told": told}, code=code))
    if any(one.sqnr_db is not None for one in cells):
        title = f"SQNR, dB (≥ {threshold_db:g})"
        bar = ColorBar(color_mapper=colours, ticker=BasicTicker(desired_num_ticks=6), height=10, title=title)
        bar.background_fill_color = None
        bar.major_label_text_color = bar.title_text_color = INK
        plot.add_layout(bar, "above")
    if row * len(layers) > TALL:
        plot.add_layout(_styled(CategoricalAxis()), "below")
    plot.grid.visible = False
    code = "return labels.bin(texts[all.indexOf(tick)], all.indexOf(tick), all.length)"
    texts = [spans.get(name, name) for name in bins]
    plot.xaxis.formatter = CustomJSTickFormatter(args={"all": bins, "texts": texts}, code=code)
    blocks = {} if row >= LABELLED else block_labels(layers, row)
    texts = [blocks.get(name, name) for name in layers]
    code = "return labels.layer(texts[all.indexOf(tick)])"
    plot.yaxis.formatter = CustomJSTickFormatter(args={"all": layers, "texts": texts}, code=code)
    plot.axis.major_tick_line_color = plot.axis.axis_line_color = None
    return plot


def block_labels(layers: Sequence[str], row: int) -> dict[str, str]:
    """{layer: the block that begins there, or ""}: where rows of `row` pixels are too thin for a label each."""
    found, last, room = {}, "", LABELLED
    for layer in layers:
        block = re.sub(r"^(.*?\.\d+)\..*", r"\1", layer)
        named = block != last and room >= LABELLED
        found[layer] = block if named else ""
        last, room = (block, row) if named else (last, room + row)
    return found


def ranges(width: tuple[float, float]) -> Model:
    """Range of one value over the timesteps; the page fills the sources that it finds by name, and sets the height.

    width: (highest, lowest) timestep. Bands: what the quantizers see, by branch; boxes: the range each bin got.
    """
    axes = {"x_axis_label": "timestep", "y_axis_label": "activation"}
    plot = _figure(height=320, x_range=Range1d(*width), y_range=Range1d(-1.0, 1.0), **axes)
    plot.name = "ranges"
    edges = ColumnDataSource({"t": []}, name="edges")
    # Both branches often see the same: one is drawn larger below the other, and their tips stand on two sides.
    looks = (("cond", BLUE, "circle", 10, "above"), ("uncond", GREEN, "diamond", 8, "below"))
    for branch, colour, marker, size, side in looks:
        band = ColumnDataSource({name: [] for name in ("t", "lo", "hi", "raw_lo", "raw_hi")}, name=branch)
        plot.varea(x="t", y1="lo", y2="hi", source=band, fill_color=colour, fill_alpha=0.22, legend_label=branch)
        for end in ("lo", "hi"):
            plot.line("t", end, source=band, line_color=colour, line_width=1.5)
            raw = f"raw_{end}"
            plot.line("t", raw, source=band, line_color=colour, line_dash="dotted", legend_label="unsmoothed")
        points = plot.scatter("t", "hi", source=band, marker=marker, size=size, fill_color=colour, line_color=None)
        tips = [("timestep", "@t{0.##}"), ("range", "@lo{0.[0000]} … @hi{0.[0000]}")]
        tips += [("before smoothing", "@raw_lo{0.[0000]} … @raw_hi{0.[0000]}"), ("call", branch)]
        plot.add_tools(HoverTool(renderers=[points], tooltips=tips, attachment=side))
    plot.vspan(x="t", source=edges, line_color=INK, line_dash="dashed", line_alpha=0.7)
    kinds = (("any", ORANGE, "solid", 2), ("cond", BLUE, "solid", 4), ("uncond", GREEN, "dashed", 2))
    for branch, colour, dash, width_of_line in kinds:
        edge: dict[str, list[Any]] = {name: [] for name in ("left", "right", "lo", "hi", "bin", "why")}
        drawn = plot.quad(
            left="left",
            right="right",
            bottom="lo",
            top="hi",
            source=ColumnDataSource(edge, name=f"boxes-{branch}"),
            fill_color=None,
            line_color=colour,
            line_dash=dash,
            line_width=width_of_line,
            legend_label="range of a bin" if branch == "any" else f"of a bin, {branch}",
        )
        tips = [("bin", "@bin"), ("range", "@lo{0.[0000]} … @hi{0.[0000]}"), ("why", "@why")]
        side = "left" if branch == "uncond" else "right"
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, attachment=side))
    items = plot.legend[0].items
    items.sort(key=lambda item: item.label.value == "unsmoothed")
    return _with_legend(plot)


def growth(steps: Sequence[StepError], other: Sequence[StepError], edges: Sequence[float], against: str = "") -> Model:
    """SQNR of the latents that each step is given, from the first to the last; `other`: of the bundle `against`."""
    times = [one.t for one in (*steps, *other)]
    plot = _figure(
        height=280,
        x_range=Range1d(max(times), min(times) - 0.01 * (max(times) - min(times) or 1.0)),
        x_axis_label="latent that the step at t is given",
        y_axis_label="SQNR, dB",
    )
    plot.name = "growth"
    plot.vspan(x=list(edges), line_color=INK, line_dash="dashed", line_alpha=0.5)
    for found, colour, label in ((steps, BLUE, "this bundle"), (other, ORANGE, against)):
        if found:
            source = ColumnDataSource({"t": [one.t for one in found], "db": [one.sqnr_db for one in found]})
            plot.line("t", "db", source=source, line_color=colour, line_width=2, legend_label=label)
            points = plot.scatter("t", "db", source=source, size=7, fill_color=colour, line_color=None)
            plot.add_tools(HoverTool(renderers=[points], tooltips=[("timestep", "@t{0.##}"), (label, "@db{0.0} dB")]))
    return _with_legend(plot)


def _with_legend(plot: figure) -> figure:
    """In one line above what it explains."""
    plot.add_layout(plot.legend[0], "above")
    plot.legend.orientation = "horizontal"
    plot.legend.background_fill_color = plot.legend.border_line_color = None
    plot.legend.label_text_color = INK
    return plot


def _figure(**options: Any) -> figure:
    plot = figure(sizing_mode="stretch_width", toolbar_location=None, tools="", min_width=120, **options)
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    for axis in plot.axis:
        _styled(axis)
    return plot


def _styled(axis: Axis) -> Axis:
    axis.major_label_text_color = axis.axis_label_text_color = INK
    axis.major_label_text_font_size = "11px"
    return axis
