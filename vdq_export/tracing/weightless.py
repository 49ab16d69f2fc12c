"""Tracing a network whose weights are nowhere: not in memory, perhaps not even on disk.

The network is built and traced with fake parameters (shape and type, no data), so that a network of any size takes the
memory of its graph. Everything else in it (rotary tables, position embeddings that are no parameters) is real. The
graph's weights are Unbound until graph.bind() gives them, and the passes may run before or after that.

What trace() does and this cannot: compare the graph with the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from vdq_export.errors import TraceError
from vdq_export.graph import Graph
from vdq_export.tracing.exporter import PREFIX, left_out, strip, tidy, to_graph, to_onnx


def trace_weightless(
    make: Callable[[], torch.nn.Module], inputs: Mapping[str, torch.Tensor], *, name: str = "model"
) -> Graph:
    """The float graph of the network that `make` builds, without its weights; Graph.source is "" until they are bound.

    make: the constructor and nothing that reads weights, as loading a checkpoint does. inputs: name -> example tensor;
    shapes and dtypes fix the static graph, values are not looked at. name: what errors call the network.
    Raises TraceError when the network cannot be built or exported so.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = _without_data(make, mode, name)
    intermediate = to_onnx(name, network, {key: mode.from_tensor(tensor) for key, tensor in inputs.items()})
    _leave_out(intermediate, name)
    tidy(intermediate)
    return to_graph(intermediate)


class _FakeStorage(TorchFunctionMode):
    """torch.empty, from which the layers of torch.nn make their parameters, allocates nothing."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.empty:
            return func(*args, **(kwargs or {}))
        with self._mode:
            return func(*args, **(kwargs or {}))


def _without_data(make: Callable[[], torch.nn.Module], mode: FakeTensorMode, name: str) -> torch.nn.Module:
    """make(), each parameter a fake one; parameters that several modules share stay shared."""
    try:
        with _FakeStorage(mode), torch.no_grad():
            network = make()
    except Exception as error:  # whatever the constructor raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(f"{name} cannot be built without weights: {reason}") from error
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in network.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    with mode:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
                module._parameters[key] = fakes[id(parameter)]
    _refuse_fakes(network.named_buffers(), name)
    return network.eval()


def _refuse_fakes(buffers: Iterable[tuple[str, torch.Tensor]], name: str) -> None:
    for path, tensor in buffers:
        if isinstance(tensor, FakeTensor):
            raise TraceError(
                f"{name}: buffer {path} has no values without a checkpoint", hint="load the weights and use trace()"
            )


def _leave_out(intermediate: ir.Model, name: str) -> None:
    """Put a placeholder, called by its parameter's path, for every fake initializer."""
    for value in intermediate.graph.initializers.values():
        tensor: Any = value.const_value
        if isinstance(getattr(tensor, "raw", None), FakeTensor):
            if not str(value.name).startswith(PREFIX + "."):
                raise TraceError(f"{name}: constant {value.name} depends on weights", hint="load them and use trace()")
            value.const_value = left_out(tensor, strip(str(value.name)))
