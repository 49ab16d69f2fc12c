"""A whole plan from a canonical graph and its record, as the compiler makes it for one network."""

from __future__ import annotations

from typing import Any

from vdq_export import pipeline
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.solve import Solved, solve
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.plan import QuantPlan
from vdq_export.recipe import Recipe
from vdq_export.target_spec import TargetSpec


def solved(
    graph: Graph, record: CalibrationRecord, recipe: Recipe, spec: TargetSpec, *, progress: Any = None, **choices: Any
) -> list[tuple[Graph, Solved]]:
    """[(float graph, plan and tensors)], one for each set of weights. choices: of draft()."""
    made = []
    for one in draft(Network(graph, record, recipe, spec), **choices):
        floated = graph.copy()
        pipeline.run_passes(floated, pipeline.FLOAT, PassContext(one, None, spec))
        made.append((floated, solve(one, floated, record, spec, progress=progress)))
    return made


def plan_of(graph: Graph, record: CalibrationRecord, recipe: Recipe, spec: TargetSpec, **choices: Any) -> QuantPlan:
    """The plan of a recipe that makes one set of weights."""
    [(_, one)] = solved(graph, record, recipe, spec, **choices)
    return one.plan
