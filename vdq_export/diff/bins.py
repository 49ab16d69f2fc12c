"""Which graph of one bundle is to be compared with which of another."""

from __future__ import annotations

from pathlib import Path

from vdq_export.bundle import Bundle
from vdq_export.inspect import bundle_graphs
from vdq_export.schedule import ScheduledBin


def pair_graphs(a: Bundle, b: Bundle) -> list[tuple[str, Path | None, Path | None]]:
    """(label, graph of `a`, graph of `b`), None for one without a counterpart.

    A bin's counterpart is of the same expert, precision and branch, and shares most timesteps with it. Its number says
    nothing: with other numbers of bins, or with experts, it stands for other calls.
    """
    graphs, others = bundle_graphs(a), bundle_graphs(b)
    found = list[tuple[str, Path | None, Path | None]]()
    counterparts = partners(a.schedule.bins, b.schedule.bins)
    for index in range(len(a.schedule.bins)):
        path, j = graphs.pop(_name(index)), counterparts.get(index)
        label = _name(index) if j in (None, index) else f"{_name(index)} -> {_name(j)}"
        found.append((label, path, None if j is None else others.pop(_name(j))))
    found += [(label, path, others.pop(label, None)) for label, path in graphs.items()]
    return found + [(label, None, path) for label, path in others.items()]


def partners(a: tuple[ScheduledBin, ...], b: tuple[ScheduledBin, ...]) -> dict[int, int]:
    """Bin of `a` -> bin of `b`, the most alike first, each once."""
    shares = {(i, j): _overlap(x, y) for i, x in enumerate(a) for j, y in enumerate(b)}
    pairs: dict[int, int] = {}
    for i, j in sorted(shares, key=lambda pair: (-shares[pair], pair)):
        if shares[i, j] > 0 and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


def _overlap(x: ScheduledBin, y: ScheduledBin) -> float:
    """Share of their calibrated timesteps that two bins have in common; without such, of their ranges."""
    if (x.when.expert, x.when.precision, x.when.branch) != (y.when.expert, y.when.precision, y.when.branch):
        return 0.0
    if common := set(x.steps) & set(y.steps):
        return len(common) / len({*x.steps, *y.steps})
    (low, high), (start, end) = x.when.t, y.when.t
    if (low, high) == (start, end):
        return 1.0
    return max(0.0, min(high, end) - max(low, start)) / (max(high, end) - min(low, start))


def _name(index: int) -> str:
    return f"bin{index:02d}"
