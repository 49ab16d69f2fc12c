"""Parts of a knapsack: units and their fronts, and the problem they make when nothing but the budget ties blocks.

See knapsack.py for the legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vdq_export.graph import Array

EPS = 1e-12


class Choice(NamedTuple):
    """label: what the caller calls it."""

    label: int
    cost: float
    error: float
    key: int = 0
    high: bool = False


@dataclass(frozen=True)
class Item:
    name: str
    group: str
    choices: tuple[Choice, ...]
    block: str = ""  # none


@dataclass(frozen=True)
class Solution:
    """labels: {item: label}. gap: the optimum's error is at least error − gap."""

    cost: float
    error: float
    labels: Mapping[str, int]
    gap: float = 0.0


class Options(NamedTuple):
    """A unit's front: cost rising, error falling; picks: the label of each of its items."""

    cost: Array
    error: Array
    picks: list[tuple[int, ...]]


class Unit(NamedTuple):
    names: tuple[str, ...]
    block: str
    low: Options
    full: Options


def unit(members: Sequence[Item], key: int | None, most_high: int | None) -> Unit:
    full = _options(members, key, high=True)
    if most_high is None:
        return Unit(tuple(i.name for i in members), "", full, full)
    return Unit(tuple(i.name for i in members), members[0].block, _options(members, key, high=False), full)


def _options(members: Sequence[Item], only: int | None, high: bool) -> Options:
    """The front over all keys (or one), with or without high choices."""
    cost, error, picks = [np.empty(0)], [np.empty(0)], list[tuple[int, ...]]()
    for key in sorted({c.key for item in members for c in item.choices}) if only is None else [only]:
        some = Options(np.zeros(1), np.zeros(1), [()])
        for item in members:
            usable = [c for c in item.choices if c.key == key and (high or not c.high)]
            some = _joined(some, usable)
        cost, error, picks = [*cost, some.cost], [*error, some.error], picks + some.picks
    return _pareto(np.concatenate(cost), np.concatenate(error), picks)


def _joined(some: Options, choices: Sequence[Choice]) -> Options:
    cost = (some.cost[:, None] + np.array([c.cost for c in choices])).reshape(-1)
    error = (some.error[:, None] + np.array([c.error for c in choices])).reshape(-1)
    return _pareto(cost, error, [(*p, c.label) for p in some.picks for c in choices])


def _pareto(cost: Array, error: Array, picks: list[tuple[int, ...]]) -> Options:
    order = np.lexsort((error, cost))
    falling = np.minimum.accumulate(np.concatenate([[np.inf], error[order]]))
    kept = order[error[order] < falling[:-1]]
    return Options(cost[kept], error[kept], [picks[i] for i in kept])


class Problem:
    def __init__(self, units: Sequence[Unit], most_high: int | None) -> None:
        self.blocks = sorted({u.block for u in units if u.block})
        self.units = sorted(units, key=lambda u: (u.block, u.names))  # units of no block come first
        self.most = len(self.blocks) if most_high is None else min(most_high, len(self.blocks))
        place = {name: number for number, name in enumerate(self.blocks)}
        self.block_of = np.array([place.get(u.block, -1) for u in self.units])
        self._tables = [
            _table([u.low if u.block else u.full for u in self.units]),
            _table([u.full for u in self.units]),
        ]

    @property
    def possible(self) -> bool:
        """Whether enough blocks have a choice without high ones."""
        bad = {b for u, b in zip(self.units, self.block_of, strict=True) if b >= 0 and not len(u.low.cost)}
        return len(bad) <= self.most

    def minima(self, price: float) -> tuple[Array, Array]:
        """([2, U] least error + price · cost of each unit without and with high choices, [2, U] option); inf: cost."""
        scores = [c if np.isinf(price) else e + price * np.where(np.isinf(e), 0, c) for c, e in self._tables]
        options = np.stack([s.argmin(axis=1) for s in scores])
        return np.stack([s.min(axis=1) for s in scores]), options

    def blocks_of(self, minima: Array) -> Array:
        """[2, blocks] sums of the units' minima."""
        inside = self.block_of >= 0
        sums = np.zeros((2, len(self.blocks)))
        for mode in (0, 1):
            np.add.at(sums[mode], self.block_of[inside], minima[mode, inside])
        return sums

    def at(self, price: float) -> Solution:
        """A solution of least error + price · cost; an infinite price: of least cost."""
        minima, options = self.minima(price)
        errors = np.stack([e[np.arange(len(e)), o] for (_, e), o in zip(self._tables, options, strict=True)])
        gain, better = (low - full for low, full in (self.blocks_of(minima), self.blocks_of(errors)))
        order = np.lexsort((-better, -gain))[: self.most]
        high = [b for b in order if gain[b] > 0 or (gain[b] == 0 and better[b] > 0)]  # high may cost nothing
        chosen = np.where(np.isin(self.block_of, high), options[1], options[0])
        return self.solution(
            [(u, int(o), b in high) for u, (o, b) in enumerate(zip(chosen, self.block_of, strict=True))]
        )

    def solution(self, picks: Sequence[tuple[int, int, bool]]) -> Solution:
        """picks: (unit, option, whether its block is high)."""
        cost, error, labels = 0.0, 0.0, dict[str, int]()
        for number, option, high in picks:
            unit = self.units[number]
            options = unit.full if high or not unit.block else unit.low
            cost, error = cost + float(options.cost[option]), error + float(options.error[option])
            labels |= dict(zip(unit.names, options.picks[option], strict=True))
        return Solution(cost, error, labels)

    def hull(self, points: int) -> list[Solution]:
        """Minima of error + λ · cost over all λ, cost rising."""
        first, last = self.at(float("inf")), self.at(0.0)
        nearest = (last.cost - first.cost) / points

        def between(a: Solution, b: Solution) -> list[Solution]:
            middle = self.between(a, b) if b.cost - a.cost > nearest else None
            return [] if middle is None else [*between(a, middle), middle, *between(middle, b)]

        return [first, *between(first, last), last] if last.cost > first.cost else [first]

    def between(self, a: Solution, b: Solution) -> Solution | None:
        """A minimum below the line through two of them, if there is one."""
        price = (a.error - b.error) / (b.cost - a.cost)
        if price <= 0:
            return None
        found = self.at(price)
        line, value = a.error + price * a.cost, found.error + price * found.cost
        below = value < line - EPS * abs(line) and a.cost < found.cost < b.cost
        return found if below else None


def _table(options: Sequence[Options]) -> tuple[Array, Array]:
    """cost, error [U, most options], filled up with infinity."""
    most = max(1, *(len(o.cost) for o in options))
    cost, error = (np.full((len(options), most), np.inf) for _ in range(2))
    for row, one in enumerate(options):
        cost[row, : len(one.cost)], error[row, : len(one.cost)] = one.cost, one.error
    return cost, error
