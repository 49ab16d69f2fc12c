"""Times on a GPU: alternating in one run, medians, by CUDA events around captured graphs where that is said."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

ROUNDS = 20
_FLUSH_BYTES = 256 << 20  # written between runs: no run finds the last one's data in the level-2 cache


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """{name: median milliseconds}; each round runs all of them once, in turn, behind a flushed cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for run in runs.values():
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            taken[name].append(begin.elapsed_time(end))
    return {name: statistics.median(times) for name, times in taken.items()}


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a replayed CUDA graph: what is timed is the kernels, not their launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
