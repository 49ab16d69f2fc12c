"""report.html: everything somebody needs who decides whether a quantized model may ship, in one file without network.

The page is made by templates/ (autoescaped); plots by Bokeh, whose JavaScript comes with its package and is put in.
Equal bundles give equal pages: no date, no path.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vdq_export import recipe_toml
from vdq_export.errors import BundleError
from vdq_export.report import figures, sections, sprites
from vdq_export.report.cells import OUTPUT, cells, when
from vdq_export.report.content import Content
from vdq_export.report.ranges import NetworkRanges
from vdq_export.schedule import Schedule


def render(content: Content) -> bytes:
    """The whole page, UTF-8. Raises BundleError for a bundle without a plan."""
    for one in (content, content.against):
        if one is not None and not one.bundle.plans:
            raise BundleError(f"{one.bundle.path} carries no plan", hint="export it again")
    environment = Environment(
        loader=PackageLoader("vdq_export.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"megabytes": sections.megabytes, "giga": sections.giga}
    return environment.get_template("page.html").render(_view(content)).encode()


def _view(content: Content) -> dict[str, Any]:
    manifest, other = content.bundle.manifest, content.against
    plots, numbers = _plots(content)
    return {
        "content": content,
        "manifest": manifest,
        "recipe": content.bundle.plans[0].recipe,
        "recipe_text": recipe_toml.dump(manifest.recipe or content.bundle.plans[0].recipe),
        "bins": [(one.name, when(one), plan.bins_why) for plan in content.bundle.plans for one in plan.bins],
        "verify": content.verify,
        "checks": sections.checks(content),
        "figures": sections.key_figures(content),
        "strips": sprites.strips(content.clips, other.clips if other else ()),
        "output": OUTPUT,
        "plots": plots,
        "ranges": numbers,
        "graphs": content.graphs,
        "largest": max((one.shared_bytes + one.own_bytes for one in content.graphs), default=1) or 1,
        "storage": content.storage.parts,
        "hoisting": [one.in_words() for one in content.hoisting.networks] if content.hoisting else [],
        "passes": sections.passes(content),
        "passes_known": content.passes is not None,
        "in_float": sections.in_float(content),
        "floating": sections.floating(content),
        "compared": sections.compared(content, other) if other else [],
        "moved": sections.moved(content, other) if other else [],
        "against": other.bundle.path.resolve().name if other else "",
        "style": _asset("page.css"),
        "script": _asset("page.js"),
        "bokeh": _bokeh(),
    }


def _plots(content: Content) -> tuple[Markup, Markup]:
    """(the plots, the numbers of the activation ranges), as JSON for the page's script."""
    threshold = content.bundle.plans[0].recipe.verify.min_layer_sqnr_db
    models = {"heat": figures.heat_map(cells(content), threshold)}
    networks = content.ranges.networks if content.ranges else ()
    times = [t for one in networks for t in one.t]
    if times:
        edge = [t for one in content.bundle.schedule.bins for t in one.when.t]
        models["ranges"] = figures.ranges((max(*times, *edge), min(*times, *edge)))
    growth = content.verify.growth if content.verify else ()
    other = content.against.verify.growth if content.against and content.against.verify else ()
    if growth or other:
        models["growth"] = figures.growth(growth, other, edges(content.bundle.schedule))
    numbers = [_range_numbers(one, content) for one in networks]
    return Markup(figures.to_json(models)), _script_json(numbers)


def edges(schedule: Schedule) -> list[float]:
    """Timesteps at which one bin ends and another begins, descending."""
    ends = sorted({t for one in schedule.bins for t in one.when.t}, reverse=True)
    return ends[1:-1]


def _range_numbers(network: NetworkRanges, content: Content) -> dict[str, Any]:
    """What the script draws of one network: by value its observed ranges, and the boxes of its bins."""
    mine = [
        plan
        for plan in content.bundle.plans
        if network.name in ("", plan.expert, ".".join(filter(None, (plan.expert, plan.bins[0].name))))
    ]
    values = []
    for value in network.values:
        boxes = []
        for plan in mine:
            layer = next((one for one in plan.layers if one.name == value.layers[0]), None)
            for place, (one, chosen) in enumerate(zip(plan.bins, layer.activation if layer else (), strict=False)):
                if layer is None or not layer.in_bin(place).quantized:
                    continue
                label = " ".join(filter(None, (one.name, plan.precision, one.branch if one.branch != "any" else "")))
                boxes.append([label, one.t[0], one.t[1], chosen.lo, chosen.hi, chosen.why])
        plain = {"lo": value.lo, "hi": value.hi, "afterLo": value.after_lo, "afterHi": value.after_hi}
        values.append({"value": value.value, "layers": value.layers, "boxes": boxes, **plain})
    ends = sorted({t for plan in mine for one in plan.bins for t in one.t}, reverse=True)
    return {"name": network.name, "t": network.t, "branch": network.branch, "edges": ends, "values": values}


def _script_json(data: Any) -> Markup:
    """JSON that cannot end the <script> it stands in."""
    return Markup(json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"))


@cache
def _asset(name: str) -> Markup:
    return Markup((resources.files("vdq_export.report") / "templates" / name).read_text(encoding="utf-8"))


@cache
def _bokeh() -> Markup:
    """BokehJS from its own package."""
    place = resources.files("bokeh") / "server" / "static" / "js" / "bokeh.min.js"
    return Markup(place.read_text(encoding="utf-8").replace("</script", "<\\/script"))
