"""What an export writes for those who will judge it: passes.json, ranges.json and, where it can be drawn, the page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from msgspec.structs import replace

from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.contract import PassReport
from vdq_export.manifest import PAGE
from vdq_export.planned import Planned
from vdq_export.report.networks import network_name
from vdq_export.report.passes import PASSES, PassesReport
from vdq_export.report.ranges import RANGES, RangesReport


def write(planned: Planned, passes: Sequence[PassReport], writer: BundleWriter) -> None:
    """Write report/passes.json and, where calibration saw anything, report/ranges.json."""
    writer.add_file(PASSES, PassesReport.of(passes).to_json())
    seen = [
        replace(part.ranges, name=network_name(part.plans[0], planned.plans))
        for part in planned.parts
        if part.ranges is not None
    ]
    if seen:
        writer.add_file(RANGES, RangesReport(networks=tuple(seen)).to_json())


def describe(bundle: Bundle) -> dict[str, bytes]:
    """{"report/report.html": the page} without clips; {} where what draws it is not installed."""
    if find_spec("bokeh") is None or find_spec("jinja2") is None:
        return {}
    from vdq_export.report.content import gather  # plotting is imported when something is plotted
    from vdq_export.report.page import render

    return {PAGE: render(gather(bundle))}
