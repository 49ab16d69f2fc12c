"""A bundle in OpenVINO: does it take every graph, run it in integers as planned, and compute what onnxruntime does?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vdq_export import float_model, ort, targets
from vdq_export.bundle import Bundle
from vdq_export.devices import openvino_runtime
from vdq_export.graph import Array, Graph
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, Trajectory, first_tensor
from vdq_export.passes.quantize_weights import runs_in_integers
from vdq_export.plan import Bin, QuantPlan
from vdq_export.runtime.ahead import Ahead

MAX_DROP_DB = 1.0


@dataclass(frozen=True)
class BinResult:
    """One bin's graph over `calls` calls of a recorded trajectory.

    onnxruntime_db, openvino_db: SQNR of all outputs against the float model's. agreement_db: of OpenVINO's against
    onnxruntime's; rounding that falls the other way grows through a deep network, so this is about as large as those.
    in_float: planned linears that OpenVINO does not run in an integer kernel.
    """

    bin: str
    calls: int
    planned: int
    in_float: tuple[str, ...]
    onnxruntime_db: float
    openvino_db: float
    agreement_db: float

    @property
    def drop_db(self) -> float:
        return self.onnxruntime_db - self.openvino_db

    @property
    def accepted(self) -> bool:
        """All planned linears in integers, and no more than MAX_DROP_DB behind onnxruntime."""
        return not self.in_float and self.drop_db <= MAX_DROP_DB


def compare(
    bundle: Bundle,
    model: Model | str | None = None,
    *,
    calls: int = 4,
    settings: Mapping[str, str] = openvino_runtime.SETTINGS,
) -> tuple[BinResult, ...]:
    """One result a bin that has calls in the model's first trajectory, over at most `calls` of them each.

    model: the float model; by default the one the manifest names. Raises MissingToolError without openvino,
    CompileError when it refuses a graph.
    """
    model = float_model.find(bundle, model)
    results = []
    for expert, network in model.networks():
        trajectory = next(iter(network.iter_trajectories()))
        for plan in (p for p in bundle.plans if p.expert == expert):
            for one in plan.bins:
                steps = _steps_of(bundle, plan, one, trajectory)[:calls]
                if steps:
                    results.append(_compare_bin(bundle, plan, one, network.module, steps, settings))
    return tuple(results)


def _steps_of(bundle: Bundle, plan: QuantPlan, one: Bin, trajectory: Trajectory) -> Trajectory:
    select = bundle.schedule.select
    return [s for s in trajectory if select(s["t"], s["branch"], precision=plan.precision) == one.index]


def _compare_bin(
    bundle: Bundle,
    plan: QuantPlan,
    one: Bin,
    module: torch.nn.Module,
    steps: Trajectory,
    settings: Mapping[str, str],
) -> BinResult:
    path, output = bundle.graph_path(one.index), bundle.manifest.signature.outputs[0].name
    names = {tensor.name for tensor in bundle.manifest.signature.inputs}
    session = ort.session(Graph.load(path), options=bundle.manifest.session)
    compiled = openvino_runtime.compile_graph(path, settings)
    found: dict[str, list[Array]] = {"float": [], "onnxruntime": [], "openvino": []}
    ahead = Ahead(bundle)
    for step in steps:
        inputs = {name: tensor.numpy() for name, tensor in step["inputs"].items() if name in names}
        feeds = ahead.arrays(one.index, session, inputs)
        with torch.no_grad():
            found["float"].append(first_tensor(module(**step["inputs"])).numpy())
        found["onnxruntime"].append(session.run([output], feeds)[0])
        found["openvino"].append(openvino_runtime.run(compiled, feeds, output))
    exact, reference, measured = (np.stack(arrays) for arrays in found.values())
    pairs = targets.load(bundle.manifest.target).spec(bundle.manifest.isa).integer
    planned = [layer.name for layer in plan.layers if runs_in_integers(layer, pairs)]
    integer = openvino_runtime.integer_layers(compiled, planned)
    return BinResult(
        bin=one.name,
        calls=len(steps),
        planned=len(planned),
        in_float=tuple(name for name in planned if name not in integer),
        onnxruntime_db=sqnr_db(exact, reference),
        openvino_db=sqnr_db(exact, measured),
        agreement_db=sqnr_db(reference, measured),
    )
