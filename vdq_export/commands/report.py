"""vdq-export report BUNDLE: one page that shows whether a bundle may ship."""

from __future__ import annotations

import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from vdq_export import float_model
from vdq_export.bundle import Bundle
from vdq_export.commands.options import bundle_argument, machine_readable, reporter, verbosity
from vdq_export.commands.outputs import Output
from vdq_export.disk import write_whole
from vdq_export.errors import MissingToolError
from vdq_export.manifest import PAGE, REPORT
from vdq_export.model import Model
from vdq_export.progress import Reporter
from vdq_export.verify import Clips, make_clips, measure

SHOWN = 4  # clips on the page unless told otherwise


@click.command("report")
@bundle_argument()
@click.option("--against", type=click.Path(path_type=Path), help="Another bundle to compare it with.")
@click.option("--model", help="The float model; by default the one the bundle names.")
@click.option(
    "--clips", type=click.IntRange(min=0), help=f"Whole clips to make and show; {SHOWN}, or as many as there are."
)
@click.option("--out", type=Output(".html"), help="Write the page here, not into BUNDLE.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
@machine_readable
@verbosity
def report_command(
    bundle: Path,
    against: Path | None,
    model: str | None,
    clips: int | None,
    out: Path | None,
    show: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Write BUNDLE's report: report/report.html, one file that needs no network.

    It shows what `vdq-export verify --save` measured. A bundle that was not verified is verified now, with as many
    clips as --clips says. Exit code 0 whatever the verdict: `vdq-export verify` is the one to ask.
    """
    told = reporter(verbose, quiet)
    opened, other = Bundle.open(bundle), None if against is None else Bundle.open(against)
    opened, verdict, page = _page(opened, other, model, clips, told, keep=out is None)
    if out is None:
        place = opened.attach(PAGE, page).path / PAGE
    else:
        write_whole(out, page)
        place = out
    facts = {"page": str(place), "bytes": len(page), "verdict": verdict}
    text = f"{place}: {len(page) / 1e6:.1f} MB, verdict {verdict}"
    click.echo(msgspec.json.encode(facts).decode() if as_json else text)
    if show:
        webbrowser.open(place.resolve().as_uri())


def _page(
    bundle: Bundle, other: Bundle | None, name: str | None, clips: int | None, told: Reporter, *, keep: bool
) -> tuple[Bundle, str, bytes]:
    """(the bundle, with what was measured when `keep`; "pass", "fail" or, with thresholds nobody measured, "open"; the
    page).

    Raises MissingToolError without what draws the page, ModelError for another model than the bundle's.
    """
    try:
        from vdq_export.report.content import gather
        from vdq_export.report.page import render
        from vdq_export.report.verdict import headline
    except ModuleNotFoundError as error:
        what = f"no {error.name} here, which draws the page"
        raise MissingToolError(what, hint=f"pip install {error.name}") from error
    count = SHOWN if clips is None else clips
    found = bundle.report
    model = None if found is not None and not count else float_model.find(bundle, name)
    if found is None:
        assert model is not None
        found, made = measure(bundle, model, clips=clips, reporter=told)
        bundle = bundle.attach(REPORT, found.to_json()) if keep else bundle
    else:
        made = Clips() if model is None else make_clips(bundle, model, count, told)
    content = replace(gather(bundle), verify=found, clips=_pairs(model, made, count))
    if other is not None:
        alike = other.manifest.model.weight_hash == bundle.manifest.model.weight_hash
        beside = Clips()
        if model is not None and alike:
            beside = make_clips(other, model, len(content.clips), told, reference=made.reference)
        content = replace(content, against=replace(gather(other), clips=_pairs(model, beside, count)))
    return bundle, headline(content)[0], render(content)


def _pairs(model: Model | None, made: Clips, count: int) -> tuple[Any, ...]:
    """The first `count` clips as the page shows them."""
    from vdq_export.report.content import ClipPair

    if model is None or model.sampler is None:
        return ()
    shown = zip(range(count), made.reference, made.quantized, strict=False)
    return tuple(ClipPair.of(model.sampler.describe(case), exact, other) for case, exact, other in shown)
