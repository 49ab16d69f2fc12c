"""report.html: everything somebody needs who decides whether a quantized model may ship, in one file without network.

The page is made by templates/ (autoescaped); plots by Bokeh, whose JavaScript comes with its package and is put in.
Equal bundles give equal pages: no date, no path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from vdq_export.errors import BundleError
from vdq_export.metrics import db_text
from vdq_export.report import comparison, figures, range_view, sections, sprites, verdict
from vdq_export.report.cells import OUTPUT, cells, span, when
from vdq_export.report.content import Content
from vdq_export.report.environment import asset, fill
from vdq_export.schedule import Schedule

FILTERS: Mapping[str, Callable[..., str]] = {
    "megabytes": sections.megabytes,
    "giga": sections.giga,
    "decibels": db_text,
}


def render(content: Content) -> bytes:
    """The whole page, UTF-8. Raises BundleError for a bundle without a plan."""
    for one in (content, content.against):
        if one is not None and not one.bundle.plans:
            raise BundleError(f"{one.bundle.path} carries no plan", hint="export it again")
    return fill("page.html", _view(content), FILTERS)


def _view(content: Content) -> dict[str, Any]:
    manifest, other = content.bundle.manifest, content.against
    name = other.bundle.path.resolve().name if other else ""
    plots, drawn, numbers = _plots(content, name)
    return {
        "content": content,
        "manifest": manifest,
        "recipe": content.bundle.plans[0].recipe,
        "recipe_text": sections.recipe_text(content),
        "bins": [(one.name, when(one), plan.bins_why) for plan in content.bundle.plans for one in plan.bins],
        "verify": content.verify,
        "headline": verdict.headline(content),
        "failures": verdict.failures(content),
        "checks": verdict.checks(content),
        "figures": sections.key_figures(content),
        "strips": sprites.strips(content.clips, other.clips if other else (), name),
        "output": OUTPUT,
        "plots": plots,
        "drawn": drawn,
        "ranges": numbers,
        "graphs": content.graphs,
        "largest": max((one.shared_bytes + one.own_bytes for one in content.graphs), default=1) or 1,
        "storage": content.storage.parts,
        "hoisting": sections.hoisted(content),
        "float_graphs": sections.float_graphs(content),
        "calibration": sections.calibration(content),
        "passes": sections.passes(content),
        "passes_known": content.passes is not None,
        "in_float": sections.in_float(content),
        "floating": sections.floating(content),
        "every_operator": verdict.every_operator(content),
        "other_values": sections.other_values(content),
        "compared": comparison.compared(content, other) if other else [],
        "moved": comparison.moved(content, other) if other else [],
        "against": name,
        "style": asset("page.css"),
        "script": asset("page.js"),
        "bokeh": _bokeh(),
        "shown": sections.SHOWN,
    }


def _plots(content: Content, against: str) -> tuple[Markup, set[str], Markup]:
    """(the plots, their names, the numbers of the activation ranges): JSON for the page's script."""
    threshold = content.bundle.plans[0].recipe.verify.min_layer_sqnr_db
    spans = {one.name: span(one) for plan in content.bundle.plans for one in plan.bins}
    models = {"heat": figures.heat_map(cells(content), threshold, spans)}
    networks = content.ranges.networks if content.ranges else ()
    times = [t for one in networks for t in one.t]
    if times:
        edge = [t for one in content.bundle.schedule.bins for t in one.when.t]
        models["ranges"] = figures.ranges((max(*times, *edge), min(*times, *edge)))
    growth = content.verify.growth if content.verify else ()
    other = content.against.verify.growth if content.against and content.against.verify else ()
    if growth or other:
        models["growth"] = figures.growth(growth, other, edges(content.bundle.schedule), against)
    return Markup(figures.to_json(models)), set(models), _script_json(range_view.numbers(content))


def edges(schedule: Schedule) -> list[float]:
    """Timesteps at which one bin ends and another begins, descending."""
    ends = sorted({t for one in schedule.bins for t in one.when.t}, reverse=True)
    return ends[1:-1]


def _script_json(data: Any) -> Markup:
    """JSON that cannot end the <script> it stands in."""
    return Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


@cache
def _bokeh() -> Markup:
    """BokehJS from its own package."""
    place = resources.files("bokeh") / "server" / "static" / "js" / "bokeh.min.js"
    return Markup(place.read_text(encoding="utf-8").replace("</script", "<\\/script"))
