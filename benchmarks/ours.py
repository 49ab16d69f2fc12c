"""From the prepared float graph and calibration record to a finished bundle, by the compiler's own functions."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import wan
from vdq_export.bundle_writer import BundleWriter
from vdq_export.compiler import finish, make_plan
from vdq_export.graph import Graph

RECIPE = "static-asq"


def export_bundle(prepared: wan.Prepared, bins: int, out: Path | None = None, *, hoist: bool = True) -> Path:
    """The bundle of `prepared` with `bins` timestep bins; made unless it exists (at `out`: always)."""
    place = out or prepared.bundle(bins, hoist=hoist)
    if out is None and place.exists():
        return place
    with BundleWriter(place, force=out is not None) as writer:
        graph = Graph.load(prepared.traced)
        graph.source = prepared.source.read_text()
        # The graph is traced already, so the module is never called.
        stand_in = wan.model(prepared.shape, torch.nn.Identity())
        planned = make_plan(
            stand_in,
            target="ort-int8",
            tsw=bins,
            recipe=RECIPE,
            hoist=hoist,
            traced={"": graph},
            calibration=prepared.record,
        )
        finish(planned, writer)
    return place
