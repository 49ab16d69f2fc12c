"""Each fused layer of a bundle's program beside onnxruntime, on onnxruntime's own inputs.

A quantized network is chaotic: a rounding of 1e-7 puts one value in some thousand into the next code, which moves every
layer behind it. So layers are judged one by one: what a layer reads is what onnxruntime computed, whatever the program
computed before. Of a layer that gives codes the floats in front of its quantizer are compared, and then the codes: they
may differ only where onnxruntime's own quotient lies so close to the edge between two codes as floats may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from tests.bin_feeds import bin_feeds
from vdq_export import ort
from vdq_export.bundle import Bundle
from vdq_export.graph import Array, Graph
from vdq_export.graphs.match import made_by
from vdq_export.model import Step
from vdq_export.runtime.device import programs_of
from vdq_export.targets.cuda import fused_ops
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.ops import DOMAIN, INPUTS
from vdq_export.targets.cuda.program import Program

_PICKED = ".picked"


@dataclass(frozen=True)
class Layer:
    """One result of a fused node.

    error: norm of the difference by the norm of what is expected; of codes: of the floats that they are made of. flips:
    share of codes that differ; far: of these, how far a float lies from the edge between the two at most, in units of
    the root mean square of all floats.
    """

    op: str
    name: str
    error: float
    flips: float = 0.0
    far: float = 0.0


@dataclass(frozen=True)
class _Codes:
    """What a quantizer of the QDQ graph saw and made: floats, and what its codes stand for."""

    value: str
    dequantized: str


def layers(bundle: Bundle, index: int, step: Step, dtype: torch.dtype) -> list[Layer]:
    """Of the program that serves bin `index`, all its fused nodes."""
    graph = Graph.load(bundle.graph_path(index))
    quantizers = _quantizers(graph)
    names = [name for name, value in graph.values().items() if value.inputs and value.dtype == np.float32]
    feeds = bin_feeds(bundle, index, step)
    expected = ort.run(graph, feeds, names, exact=True)
    (program,) = [one for one in programs_of(bundle).programs if index in one.bins]
    path = bundle.path / program.graph
    fused = onnx.load(path, load_external_data=False)
    feeds["bin"] = np.array([program.bins.index(index)])
    runner = _Forced(lower(path, dtype=dtype), fused, expected, quantizers)
    with torch.no_grad():
        runner.run(*[torch.from_numpy(feeds[port.name]).to(port.dtype) for port in runner.inputs])
    assert not runner.missing, f"no such values in onnxruntime's graph: {runner.missing}"
    assert len(runner.seen) == sum(one.domain == DOMAIN and one.op_type in fused_ops.CALLS for one in fused.graph.node)
    return runner.found


def _quantizers(graph: Graph) -> dict[str, _Codes]:
    """By the name of their scale."""
    found = {}
    for node in graph.nodes:
        if node.op == "DequantizeLinear" and (there := made_by(node.inputs[0], "QuantizeLinear")) is not None:
            clip = made_by(there.inputs[0], "Clip")
            value = clip.inputs[0] if clip is not None else there.inputs[0]
            found[node.inputs[1].name] = _Codes(value.name, node.outputs[0].name)
    return found


class _Forced(fx.Interpreter):
    def __init__(
        self, program: Program, fused: onnx.ModelProto, expected: Mapping[str, Array], quantizers: Mapping[str, _Codes]
    ) -> None:
        super().__init__(program.module)
        self.inputs = program.inputs
        self.expected, self.quantizers = expected, quantizers
        self.makers = {name: node for node in fused.graph.node for name in node.output if name}
        self.found: list[Layer] = []
        self.missing: list[str] = []
        self.seen: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target not in fused_ops.CALLS.values():
            found = super().run_node(n)
            name = n.meta.get("onnx", "")
            if isinstance(found, Tensor) and name in self.expected:
                return torch.from_numpy(self.expected[name]).to(found.dtype)
            return found
        names = [n.meta["onnx"]] if "onnx" in n.meta else [one.meta["onnx"] for one in n.users]
        node = self.makers[names[0]]
        self.seen.add(node.name)
        _, arguments = self.fetch_args_kwargs_from_env(n)
        results: Any = n.target(**arguments)  # type: ignore[operator]
        several = not isinstance(results, Tensor)
        if not several:
            return self._result(node, node.output[0], results, arguments)
        outputs = [*node.output, *[""] * (len(results) - len(node.output))]
        return tuple(
            self._result(node, name, result, arguments) if name else result
            for name, result in zip(outputs, results, strict=True)
        )

    def _result(self, node: onnx.NodeProto, name: str, result: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Compared; what onnxruntime has in its place."""
        if result.dtype in (torch.int8, torch.float8_e4m3fn):
            return self._codes(node, name, result, arguments)
        if name not in self.expected:
            self.missing.append(name)
            return result
        want = torch.from_numpy(self.expected[name])
        self.found.append(Layer(node.op_type, name, _distance(result, want)))
        return want.reshape(result.shape).to(result.dtype)

    def _codes(self, node: onnx.NodeProto, name: str, result: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Codes compared, and the floats that they were made of."""
        place = list(INPUTS[node.op_type]).index("out_scale")
        scale_name = node.input[place].split(_PICKED)[0]
        known = self.quantizers.get(scale_name)
        if known is None or known.dequantized not in self.expected:
            self.missing.append(f"{name} ({scale_name})")
            return result
        value, dequantized = (torch.from_numpy(self.expected[one]).double() for one in (known.value, known.dequantized))
        found, scale, zero = _floats(node.op_type, arguments)
        codes = dequantized / scale + zero
        want = (codes.round() if result.dtype == torch.int8 else codes.float()).to(result.dtype).reshape(result.shape)
        edge = ((result.double() + want.double()) / 2).reshape(value.shape)  # of codes that are neighbours
        wrong = result.float().reshape(value.shape) != want.float().reshape(value.shape)
        away = ((edge - zero) * scale - value).abs()[wrong] / value.square().mean().sqrt()
        share, far = float(wrong.double().mean()), float(away.max()) if len(away) else 0.0
        self.found.append(Layer(node.op_type, name, _distance(found, value), share, far))
        return want


def _floats(op: str, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | float]:
    """(what the node quantizes; its scale, of all or of each channel; its zero point)"""
    if op == "Rope":
        given = {key: value for key, value in arguments.items() if key not in ("scale", "codes")}
        made = fused_ops.CALLS[op](**given)
        return made, arguments["scale"].double().repeat_interleave(made.shape[-1] // arguments["heads"]), 0.0
    quant = arguments["quant"]
    made = fused_ops.CALLS[op](**{**arguments, "keep": True, "quant": None})[0]
    return made, quant.scale.double(), 0.0 if quant.zero is None else quant.zero.double()


def _distance(found: Tensor, want: Tensor) -> float:
    found, want = found.double().reshape(-1), want.double().reshape(-1)
    return float((found - want).norm() / want.norm().clamp(min=1e-30))
