"""A bundle's graph with some of its layers put back to float, without exporting it again.

A layer's product is computed from the value it read before quantization and the float weight, smoothed and rotated as
the plan says, and takes the place of what the bundle's graph made of it: quantizers, integers, low-rank branches go.
That is the graph an export has with the layer kept in float in this bin (calib/float_bins.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from vdq_export.errors import BundleError
from vdq_export.graph import Graph, Linear, Value

_QUANTIZING = ("DequantizeLinear", "QuantizeLinear", "Clip")
_DYNAMIC = re.compile(r"(.*)/Dynamic(_\d+)?$")  # what passes/dynamic_quantize.py calls a quantized value


def put_back(graph: Graph, linears: Iterable[Linear]) -> None:
    """Let `graph`, of a bin, compute these layers in float. Raises BundleError where it does not have them."""
    for one in linears:
        value, output = _ends(graph.values(), one)
        path, shape = one.name, [*value.shape[:-1], one.shape[1]]
        weight = graph.derived(graph.fresh(f"{path}.weight.float"), one.weight, np.asarray, dtype=np.float32)
        made = graph.add_node("MatMul", [value, weight], graph.fresh(f"{path}/Float"), dtype=np.float32, shape=shape)
        if one.bias is not None:
            bias = graph.constant(graph.fresh(f"{path}.bias.float"), one.bias.values)
            made = graph.add_node("Add", [made, bias], graph.fresh(f"{path}/Biased"), dtype=np.float32, shape=shape)
        if shape != list(output.shape):
            sizes = graph.constant(graph.fresh(f"{path}/Shaped.shape"), np.array(output.shape, np.int64))
            name = graph.fresh(f"{path}/Shaped")
            made = graph.add_node("Reshape", [made, sizes], name, dtype=np.float32, shape=list(output.shape))
        name = output.name
        graph.replace_uses(output, made)
        if output.name == name:  # no output of the graph: layers behind find what they read by its name
            output.name, made.name = graph.fresh(f"{name}/quantized"), name
    graph.cleanup()


def _ends(values: Mapping[str, Value], linear: Linear) -> tuple[Value, Value]:
    """(what the layer reads before it is quantized, what it gives) in a bin's graph with these values.

    Both have the names they have in the float graph, but where a target's own pass has fused what made the input: then
    it is found behind the product with the integer weight. Raises BundleError where neither is there.
    """
    value, output = values.get(linear.matmul.inputs[0].name), values.get(linear.output.name)
    weight = values.get(f"{linear.name}/Weight")
    if value is None and weight is not None:
        value = weight.outputs[0].inputs[0]
        while value.inputs and value.inputs[0].op in _QUANTIZING:
            value = value.inputs[0].inputs[0]
        if (named := _DYNAMIC.match(value.name)) is not None:
            value = values.get(named[1])
    if value is None or output is None:
        raise BundleError(f"no graph of a bin has {linear.name} as its plan has it", hint="export it again")
    return value, output
