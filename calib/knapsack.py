"""One choice an item under a budget, with choices tied together: exact.

    minimise Σ error  subject to  Σ cost ≤ budget,  items of one group take choices of the same key,
                                  at most `most_high` blocks hold a choice marked high

Legend: a *unit* is the items of a group that lie in one block, with its own small front of (cost, error) options,
twice: `low` without high choices and `full` with them. λ: price of cost in units of error.

Front: for a price λ the units fall apart, min Σ error + λ·cost is one minimum a unit, and a block is high where that
lowers its minimum most. Each such minimum is optimal at its own cost (Everett 1963); halving between neighbours finds
them all. Budget in between: the states (cost, error, high blocks) reachable unit by unit, without those another one
beats in both (Nemhauser & Ullmann 1969) and without those that even at the price λ of the budget cannot beat the best
solution known (Lagrangian bound: error + λ·(cost − budget) + the cheapest rest). What is left at the end is optimal;
should more than LIMIT states stay, the least promising go and `gap` says how far from optimal the answer can be.

A group whose items lie in several blocks ties those blocks together: each of its keys is tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from vdq_export.calib.knapsack_search import least_error
from vdq_export.calib.knapsack_units import Choice, Item, Problem, Solution, unit

__all__ = ["Choice", "Infeasible", "Item", "Solution", "best", "front"]
MOST_TIES = 256  # combinations of keys of groups that lie in several blocks


class Infeasible(ValueError):
    """No choice of labels meets the constraints. least: the smallest possible cost, inf where there is none at all."""

    def __init__(self, least: float) -> None:
        super().__init__(f"least possible cost {least}")
        self.least = least


def front(items: Sequence[Item], most_high: int | None = None, points: int = 64) -> list[Solution]:
    """Solutions of falling error and rising cost, each optimal at its cost; from the cheapest to the best there is.

    points: neighbours nearer than this share of the whole span of costs are not told apart. Raises Infeasible.
    """
    found = [one for problem in _problems(items, most_high) for one in problem.hull(points)]
    if not found:
        raise Infeasible(float("inf"))
    kept: list[Solution] = []  # lower convex hull: what is on it no solution of another problem beats at its cost
    for one in sorted(found, key=lambda s: (s.cost, s.error)):
        if kept and one.error >= kept[-1].error:
            continue
        while len(kept) > 1 and _above(kept[-2], kept[-1], one):
            kept.pop()
        kept.append(one)
    return kept


def _above(a: Solution, b: Solution, c: Solution) -> bool:
    """Whether b lies on or above the line from a to c, rising in cost."""
    return (b.error - a.error) * (c.cost - a.cost) >= (c.error - a.error) * (b.cost - a.cost)


def best(items: Sequence[Item], budget: float, most_high: int | None = None) -> Solution:
    """The least error within the budget. Raises Infeasible."""
    answer: Solution | None = None
    least = float("inf")
    for problem in _problems(items, most_high):
        cheapest = problem.at(float("inf"))
        least = min(least, cheapest.cost)
        if cheapest.cost <= budget:
            found = least_error(problem, budget, float("inf") if answer is None else answer.error)
            gap = max(found.gap, 0.0 if answer is None else answer.gap)
            better = found if answer is None or found.error < answer.error else answer
            answer = Solution(better.cost, better.error, better.labels, gap)
    if answer is None:
        raise Infeasible(least)
    return answer


def _problems(items: Sequence[Item], most_high: int | None) -> Iterator[Problem]:
    """One for each combination of keys of the groups that lie in several blocks."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    tied = {n: m for n, m in groups.items() if most_high is not None and len({i.block for i in m}) > 1}
    keys = [sorted({c.key for i in members for c in i.choices}) for members in tied.values()]
    if np.prod([len(k) for k in keys], dtype=float) > MOST_TIES:
        raise ValueError(f"{len(tied)} groups lie in several blocks: too many combinations of their keys")
    for combination in product(*keys):
        fixed = dict(zip(tied, combination, strict=True))
        units = []
        for name, members in groups.items():
            if name in fixed:
                units += [unit([item], fixed[name], most_high) for item in members]
            else:
                units.append(unit(members, None, most_high))
        if all(len(one.full.cost) for one in units):
            problem = Problem(units, most_high)
            if problem.possible:
                yield problem
