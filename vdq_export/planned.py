"""What the compiler knows before any graph is quantized: each network's float graph and the plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdq_export.calib.step_reuse import Learnt
from vdq_export.contract import PassReport
from vdq_export.errors import ModelError
from vdq_export.graph import Graph
from vdq_export.hoisting.split import Hoisted
from vdq_export.manifest import Signature
from vdq_export.model import Model
from vdq_export.plan import QuantPlan
from vdq_export.recipe import Recipe
from vdq_export.report.ranges import NetworkRanges
from vdq_export.target_spec import TargetSpec


@dataclass(frozen=True)
class Part:
    """One set of weights: the float graph with smoothing and rotation carried out, and what quantizes it.

    Several plans: the same weights under other activation precisions. signature: of the network. hoisted: what left the
    graph, which then is its body. probe: what step reuse needs of this network. ranges: what its linears read.
    """

    graph: Graph
    plans: tuple[QuantPlan, ...]
    tensors: Mapping[str, Any]
    signature: Signature
    hoisted: Hoisted | None = None
    probe: Learnt | None = None
    ranges: NetworkRanges | None = None


@dataclass(frozen=True)
class Planned:
    """What is known before any graph is quantized."""

    model: Model
    spec: TargetSpec
    recipe: Recipe
    parts: tuple[Part, ...]
    reports: list[PassReport]

    @property
    def plans(self) -> tuple[QuantPlan, ...]:
        """In the order of their bins' numbers."""
        return tuple(sorted((p for part in self.parts for p in part.plans), key=lambda plan: plan.bins[0].index))

    @property
    def signature(self) -> Signature:
        """What all networks take and give. Raises ModelError when they differ in it."""
        found = [part.signature for part in self.parts]
        if any(one != found[0] for one in found):
            raise ModelError(
                f"the experts of {self.model.name} differ in their inputs or outputs", hint="give all the same ones"
            )
        return found[0]
