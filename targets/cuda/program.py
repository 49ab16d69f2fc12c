"""A lowered graph that runs: eagerly anywhere, and on a GPU as one captured CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdq_export.errors import CompileError, ModelError
from vdq_export.targets.cuda.onnx_parts import Port

WARM_UPS = 3
FLOAT = torch.float16  # between the kernels, unless asked otherwise; kernels are compiled ahead for it


class Program:
    """program(feeds) -> {output: tensor on the device}. module: the torch.fx graph; weights: its buffers.

    inputs: as the module takes them; feeds of other float types are cast. outputs: of the types that the graph says.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Port], outputs: Sequence[Port], device: torch.device,
        weights: Sequence[Any],
    ) -> None:  # fmt: skip
        self.module, self.inputs, self.outputs, self.device = module, tuple(inputs), tuple(outputs), device
        self._weights = weights
        self._captured: _Captured | None = None

    @property
    def weight_bytes(self) -> int:
        """Of all buffers, those that other programs share too; what lies twice in one place counts once."""
        return sum({_place(one): one.nbytes for one in self._weights}.values())

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """After capture() the results are the program's own buffers: the next call writes them again.

        Raises ModelError for feeds that are missing, too many, or of another shape.
        """
        self._check(feeds)
        with torch.no_grad():
            if self._captured is not None:
                return self._captured(feeds)
            given = [feeds[one.name].to(self.device, one.dtype) for one in self.inputs]
            results = self.module(*given)
        return {one.name: value for one, value in zip(self.outputs, results, strict=True)}

    def capture(self, pool: Any = None) -> Program:
        """Record one run as a CUDA graph, which all later calls replay; returns the program.

        pool: of torch.cuda.graph_pool_handle(); programs that share it share the memory of intermediate values, and a
        run of one overwrites the results of another. Raises CompileError off a GPU.
        """
        if self.device.type != "cuda":
            raise CompileError(f"a program on {self.device} cannot be captured", hint='lower it with device="cuda"')
        if self._captured is None:
            with torch.no_grad(), torch.cuda.device(self.device):
                self._captured = _Captured(self, pool)
        return self

    @property
    def captured(self) -> bool:
        return self._captured is not None

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        names = [one.name for one in self.inputs]
        if unknown := [name for name in feeds if name not in names]:
            raise ModelError(f"the program has no input {unknown[0]!r}", hint=f"it takes {', '.join(names)}")
        for one in self.inputs:
            if one.name not in feeds:
                raise ModelError(f"input {one.name!r} is missing", hint=f"the program takes {', '.join(names)}")
            if tuple(feeds[one.name].shape) != one.shape:
                raise ModelError(f"{one.name} is {list(feeds[one.name].shape)}, the program takes {list(one.shape)}")


class _Captured:
    """Static inputs, the graph that reads them, static outputs."""

    def __init__(self, program: Program, pool: Any) -> None:
        self._outputs = program.outputs
        self._given = {
            one.name: torch.zeros(one.shape, dtype=one.dtype, device=program.device) for one in program.inputs
        }
        for buffer in self._given.values():  # what is tuned on zeros is tuned for zeros
            if buffer.is_floating_point():
                buffer.normal_()
        given = list(self._given.values())
        cuda: Any = torch.cuda
        side = cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are compiled, tuned and loaded here: none of that can be captured
            for _ in range(WARM_UPS):
                program.module(*given)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and launch meanwhile: what they do is none of this graph.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._results = program.module(*given)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, buffer in self._given.items():
            buffer.copy_(feeds[name], non_blocking=True)
        self._graph.replay()
        return {one.name: value for one, value in zip(self._outputs, self._results, strict=True)}


def _place(weight: Any) -> Any:
    """Where it lies in memory."""
    if not isinstance(weight, Tensor):
        return id(weight)
    return id(weight) if weight.device.type == "meta" else (weight.data_ptr(), weight.nbytes)
