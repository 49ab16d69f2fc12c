"""What a pass is given and what it returns; the runner and the order live in pipeline.py.

A pass module in passes/ has NAME, AFTER (names of passes that must precede it), a docstring with the algebra, and
`run(graph, context) -> PassReport`. Passes are idempotent, write deterministic bytes, and do nothing to graphs they
do not concern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vdq_export.graph import Array
from vdq_export.plan import Bin, QuantPlan
from vdq_export.target_spec import TargetSpec


@dataclass(frozen=True)
class PassContext:
    """Inputs of a pass beside the graph. Float passes need none of them; bin-dependent passes need all.

    tensors: the plan's arrays, by plan.tensor_name().
    """

    plan: QuantPlan | None = None
    bin: Bin | None = None
    spec: TargetSpec | None = None
    tensors: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Skip:
    """A planned or possible edit that was not made: where (layer or node) and why."""

    where: str
    why: str


@dataclass
class PassReport:
    """What one pass did to one graph: `applied` counts edits, `details` says where each one landed.

    network: which graph, where a bundle has several: an expert, a bin, a part that was hoisted; pipeline.of_network().
    """

    name: str
    applied: int = 0
    details: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    network: str = ""

    def did(self, detail: str) -> None:
        """One edit was made; detail: at which layer or node."""
        self.applied += 1
        self.details.append(detail)

    def skip(self, where: str, why: str) -> None:
        """One edit was not made; with --strict that fails the export."""
        self.skipped.append(Skip(where, why))
