"""What onnxruntime's CPU provider runs in integer kernels, told from the graph it optimised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from vdq_export.passes.quantize_weights import runs_in_integers
from vdq_export.plan import IntType, QuantPlan

_INTEGER_KERNELS = {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}


def integer_layers(optimised_model: Path, plan: QuantPlan, pairs: Sequence[tuple[IntType, IntType]]) -> dict[str, bool]:
    """For each layer of `plan` that is planned for an integer kernel: does the optimised graph run it in one?

    pairs: TargetSpec.integer.
    """
    graph = onnx.load(optimised_model, load_external_data=False).graph
    fed = {name for node in graph.node if node.op_type in _INTEGER_KERNELS for name in node.input}
    return {
        layer.name: f"{layer.name}.weight.{layer.weight.dtype}" in fed
        for layer in plan.layers
        if layer.weight is not None and runs_in_integers(layer, pairs)
    }
