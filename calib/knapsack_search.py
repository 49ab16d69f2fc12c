"""The exact least error within a budget that lies between two points of a knapsack's front.

See knapsack.py for the method and its sources.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vdq_export.calib.knapsack_units import EPS, Problem, Solution
from vdq_export.graph import Array

LIMIT = 50_000  # states


def least_error(problem: Problem, budget: float, known: float = float("inf")) -> Solution:
    """Least error within a budget not below the least cost; with `known`, the error of a solution of another problem,
    any solution where none is better than that."""
    lower, upper = problem.at(float("inf")), problem.at(0.0)
    if upper.cost <= budget:
        return upper
    while (found := problem.between(lower, upper)) is not None:
        lower, upper = (found, upper) if found.cost <= budget else (lower, found)
    price = max(0.0, (lower.error - upper.error) / (upper.cost - lower.cost))
    search = _Search(problem, budget, price, min(known, lower.error))
    found = search.run() or lower
    gap = max(0.0, min(known, found.error) - search.dropped)
    return Solution(found.cost, found.error, found.labels, gap)


class _States(NamedTuple):
    """Partial solutions: cost, error, blocks that are high so far, whether the present one is; and where from."""

    cost: Array
    error: Array
    high: Array
    mode: Array
    parent: Array
    option: Array

    def take(self, index: Array) -> _States:
        return _States(*(column[index] for column in self))


class _Search:
    """Unit by unit, block by block, with dominance and the Lagrangian bound."""

    def __init__(self, problem: Problem, budget: float, price: float, known: float) -> None:
        self.problem, self.budget, self.price, self.known = problem, budget, price, known
        self.dropped = float("inf")  # least bound of a state that LIMIT cost
        self.rest = _Rest(problem, price)
        self.rest_cost = _Rest(problem, float("inf"))

    def run(self) -> Solution | None:
        """None where nothing is better than `known`."""
        problem = self.problem
        zero = np.zeros(1)
        states = _States(zero, zero, zero.astype(int), zero.astype(int), zero.astype(int), zero.astype(int))
        trail: list[_States] = []
        before = -1
        for number, block in enumerate(problem.block_of):
            entered = self._enter(states) if block != before else states._replace(parent=np.arange(len(states.cost)))
            states, before = self._extend(entered, number, int(block)), int(block)
            trail.append(states)
            if not len(states.cost):
                return None
        end = int(states.error.argmin())
        picks = []
        for number in reversed(range(len(trail))):
            state = trail[number].take(np.array([end]))
            picks.append((number, int(state.option[0]), bool(state.mode[0])))
            end = int(state.parent[0])
        return problem.solution(picks)

    def _enter(self, states: _States) -> _States:
        """A new block: each state goes on with it low and, if one more may be, with it high."""
        count = len(states.cost)
        low = states._replace(mode=np.zeros(count, int), parent=np.arange(count))
        more = np.flatnonzero(states.high < self.problem.most)
        high = states.take(more)._replace(high=states.high[more] + 1, mode=np.ones(len(more), int), parent=more)
        return _States(*(np.concatenate(pair) for pair in zip(low, high, strict=True)))

    def _extend(self, states: _States, number: int, block: int) -> _States:
        unit = self.problem.units[number]
        parts = []
        for mode, options in ((0, unit.low if unit.block else unit.full), (1, unit.full)):
            index = np.flatnonzero(states.mode == mode)
            own = states.take(index)
            option = np.tile(np.arange(len(options.cost)), len(index))
            spread = own.take(np.repeat(np.arange(len(index)), len(options.cost)))
            grown = spread._replace(
                cost=spread.cost + options.cost[option], error=spread.error + options.error[option], option=option
            )
            parts.append(self._bounded(grown, number, block, mode))
        joined = _States(*(np.concatenate(pair) for pair in zip(*parts, strict=True)))
        return self._limited(_undominated(joined), number, block)

    def _bound(self, states: _States, number: int, block: int) -> Array:
        """No completion has less error than this."""
        rest = self.rest.after(number, block, states.mode, self.problem.most - states.high)
        bound: Array = states.error + self.price * (states.cost - self.budget) + rest
        return bound

    def _bounded(self, states: _States, number: int, block: int, mode: int) -> _States:
        left = self.problem.most - states.high
        cheapest = states.cost + self.rest_cost.after(number, block, states.mode, left)
        within = cheapest <= self.budget * (1 + 1e-15)
        hopeful = self._bound(states, number, block) < self.known - EPS * abs(self.known)
        return states.take(np.flatnonzero(within & hopeful))

    def _limited(self, states: _States, number: int, block: int) -> _States:
        if len(states.cost) <= LIMIT:
            return states
        bound = self._bound(states, number, block)
        order = np.argsort(bound, kind="stable")
        self.dropped = min(self.dropped, float(bound[order[LIMIT]]))
        return states.take(order[:LIMIT])


class _Rest:
    """The least of what follows a unit, at a price: what is left of its block, and the later blocks."""

    def __init__(self, problem: Problem, price: float) -> None:
        minima, _ = problem.minima(price)
        self.inside = np.zeros((len(problem.units), 2))  # of the same block (or of none), after the unit
        for number in reversed(range(len(problem.units) - 1)):
            if problem.block_of[number] == problem.block_of[number + 1]:
                self.inside[number] = self.inside[number + 1] + minima[:, number + 1]
        low, full = problem.blocks_of(minima)
        self.later = np.zeros((len(low) + 1, problem.most + 1))  # [first later block, high ones left]
        for block in reversed(range(len(low))):
            self.later[block] = self.later[block + 1] + low[block]
            self.later[block, 1:] = np.minimum(self.later[block, 1:], self.later[block + 1, :-1] + full[block])

    def after(self, number: int, block: int, mode: Array, left: Array) -> Array:
        found: Array = self.inside[number, mode] + self.later[block + 1, left]
        return found


def _undominated(states: _States) -> _States:
    """Without states that cost at least as much as another one and err at least as much, in the same mode."""
    kind = states.high * 2 + states.mode
    order = np.lexsort((states.error, states.cost, kind))
    kept = []
    for one in np.split(order, np.flatnonzero(np.diff(kind[order])) + 1):
        error = states.error[one]
        falling = np.minimum.accumulate(np.concatenate([[np.inf], error]))[:-1]
        kept.append(one[error < falling])
    return states.take(np.concatenate(kept)) if kept else states
