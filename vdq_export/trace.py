"""Model -> float ONNX graph: static shapes, opset 21, every value and initializer named by its module path.

Weights are not copied: the graph's large constants are views of the module's own tensors, or of the checkpoint's files
where the module has none.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vdq_export import ort
from vdq_export.errors import TraceError
from vdq_export.graph import OUTPUT, Graph, bind
from vdq_export.model import Model
from vdq_export.tracing.exporter import tidy, to_graph, to_onnx
from vdq_export.tracing.weightless import trace_weightless
from vdq_export.weights.checkpoint import Checkpoint

# A model is compared with torch up to this size (of its weights in float32): torch and onnxruntime then hold it a
# second and a third time, and a network of that class has been compared once it was traced with few layers.
COMPARED_BYTES = 2**30


def trace(model: Model, *, tolerance: float = 1e-4) -> Graph:
    """The model's float graph, checked against the module on the example inputs.

    tolerance: largest |difference| allowed, relative to the largest |output|; math.inf: not run at all, for networks
    that memory holds once only. Raises TraceError when the module cannot be exported, the graph does not agree with
    it, or it is several networks.
    """
    if model.experts:
        raise TraceError(f"{model.name} is {len(model.experts)} networks", hint="trace each of model.networks()")
    if model.graph is not None:
        graph = model.graph.copy()
        graph.source = model.weight_hash()
    elif model.checkpoint is None:
        graph = _with_weights(model)
    else:
        graph = _with_checkpoint(model, model.checkpoint)
        if model.checkpoint.nbytes_computed > COMPARED_BYTES:
            return graph
    error = float_error(graph, model) if tolerance < math.inf else 0.0
    if not error <= tolerance:
        raise TraceError(
            f"{model.name}: graph and module differ by {error:.2e} of the largest output (allowed {tolerance:.0e})",
            hint="a module whose forward depends on data or randomness cannot be traced",
        )
    return graph


def _with_weights(model: Model) -> Graph:
    intermediate = to_onnx(model.name, model.materialized(), model.example_inputs)
    tidy(intermediate)
    return to_graph(intermediate, source=model.weight_hash())


def _with_checkpoint(model: Model, checkpoint: Checkpoint) -> Graph:
    """Traced without weights, which are then bound where they lie; they are hashed meanwhile.

    A small network that cannot be traced so (a buffer of it is computed from weights) gets its weights before.
    """
    assert model.make is not None
    with ThreadPoolExecutor(1) as pool:
        source = pool.submit(model.weight_hash)
        try:
            graph = trace_weightless(model.make, model.example_inputs, name=model.name)
        except TraceError:
            if checkpoint.nbytes_computed > COMPARED_BYTES:
                raise
            return _with_weights(model)
        bind(graph, checkpoint, source=source.result())
    return graph


def float_error(graph: Graph, model: Model) -> float:
    """max|graph − module| / max|module| on the example inputs, both in float32."""
    expected = model(**model.example_inputs).float().numpy()
    names = {i.name for i in graph.gs.inputs}
    feeds = {n: t.numpy() for n, t in model.example_inputs.items() if n in names}
    actual = ort.run(graph, feeds)[OUTPUT]
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual - expected).max()) / scale
