"""Which of many items to mend so that an error becomes small enough: few of them, and none in vain.

error(S) is what is measured with the items S mended. It is taken for a sum,

    error(S) = error(all) + sum of weight[i] over the items i that are not in S

where every weight is at first what a prior says, give or take as much again, and then what agrees best with all that
was measured (least squares). Errors are not quite a sum, so a set counts as enough when it was measured to be, never
because it was predicted.

1. The next set to measure is the shortest from the top, largest weight first, that is predicted to be enough and is
   smaller than the best; while that succeeds the steps down double, so that a prior that knows nothing costs little.
2. Once that set was measured before, members of the best are tried without, one by one, least weight first, until none
   can be left out.
3. Of the sets of one member fewer, those are tried that differ from the predicted one in a member near its end: there
   the weights are alike. If one is enough, or what was learned predicts yet another, all of it again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

import numpy as np

from vdq_export.graph import Array

_LEAST = 1e-3  # of the largest weight: of no item it is known beforehand that it does nothing
_NEAR = 2  # items on either side of a predicted set's end that are exchanged
_OFF, _LEAST_OFF = 0.01, 2e-4  # a measurement is off the sum by this share of itself; of the whole error at least
T = TypeVar("T", bound=Hashable)


def search(
    prior: Mapping[T, float],
    error: Callable[[frozenset[T]], float],
    *,
    start: float,
    floor: float,
    allowed: float,
    runs: int,
) -> tuple[frozenset[T], bool]:
    """(items that bring the error down to `allowed`, whether it is known that none of them can be left out).

    prior: how much of the error each item is expected to make, in any unit. start, floor: error of nothing and of all,
    start > allowed >= floor. At most `runs` calls of `error`; the second is False where they did not suffice.
    """
    tried = _Tried(prior, error, (start, floor, allowed), runs)
    try:
        while True:
            _descend(tried)
            _drop(tried)
            if not _exchange(tried) and tried.predicted(1) is None:
                return tried.best, True
    except _SpentError:
        return tried.best, False


class Sum(Generic[T]):
    """What is believed of the weights, in shares of the error that all of them make up."""

    def __init__(self, prior: Mapping[T, float]) -> None:
        self.items = tuple(sorted(prior, key=lambda one: -prior[one]))
        known = np.maximum(np.array([prior[item] for item in self.items], np.float64), 0.0)
        known += _LEAST * (known.max() or 1.0)
        self._prior = known / known.sum()
        self._unmended = [np.ones(len(self.items))]
        self._shares = [1.0]  # with nothing mended

    def learn(self, members: frozenset[T], share: float) -> None:
        """share: what was left of the error with `members` mended."""
        self._unmended.append(np.array([item not in members for item in self.items], np.float64))
        self._shares.append(share)

    def weights(self) -> Array:
        """One an item: prior and measurements are normal variables, this is the mean given the latter."""
        rows, shares = np.array(self._unmended), np.array(self._shares)
        spread = rows * self._prior**2  # covariance of each measurement with each weight
        noise = np.maximum(_OFF * np.abs(shares), _LEAST_OFF) ** 2
        known = np.linalg.solve(spread @ rows.T + np.diag(noise), shares - rows @ self._prior)
        found: Array = self._prior + spread.T @ known
        return found


class _SpentError(Exception):
    """No runs are left."""


class _Tried(Generic[T]):
    """The sets that were measured, each once, and the smallest that was enough."""

    def __init__(
        self,
        prior: Mapping[T, float],
        error: Callable[[frozenset[T]], float],
        scale: tuple[float, float, float],
        runs: int,
    ) -> None:
        self._error, self._left, self._sum = error, runs, Sum(prior)
        self._start, self._floor, self._allowed = scale
        self.best = frozenset(prior)
        self._known = {self.best: True, frozenset[T](): False}

    def enough(self, members: frozenset[T]) -> bool:
        if members not in self._known:
            if self._left <= 0:
                raise _SpentError
            self._left -= 1
            error = self._error(members)
            self._sum.learn(members, self._share(error))
            self._known[members] = error <= self._allowed
            if self._known[members] and len(members) < len(self.best):
                self.best = members
        return self._known[members]

    def predicted(self, fewer: int) -> frozenset[T] | None:
        """The shortest set from the top that should be enough, `fewer` than the best has at least; None: known."""
        falling = self.falling()
        left = sum(falling.values()) - np.cumsum(list(falling.values()))  # with so many and one more mended
        count = 1 + int(np.argmax(np.append(left, -np.inf) <= self._share(self._allowed)))
        members = frozenset(list(falling)[: max(min(count, len(self.best) - fewer), 0)])
        return None if members in self._known else members

    def _share(self, error: float) -> float:
        return (error - self._floor) / (self._start - self._floor)

    def falling(self) -> dict[T, float]:
        """Item -> weight, as far as is known by now, largest first."""
        weights = zip(self._sum.items, self._sum.weights().tolist(), strict=True)
        return dict(sorted(weights, key=lambda one: -one[1]))


def _descend(tried: _Tried[T]) -> None:
    """Measure what is predicted until that is known."""
    fewer = 1
    while (members := tried.predicted(fewer)) is not None or fewer > 1:
        fewer = 2 * fewer if members is not None and tried.enough(members) else 1


def _drop(tried: _Tried[T]) -> None:
    """Leave out members of the best one by one, until it is known of each that it cannot be: those last that could not
    be left out of a larger set."""
    needed = set[T]()
    while True:
        rising = [one for one in reversed(tried.falling()) if one in tried.best]
        for one in sorted(rising, key=needed.__contains__):
            if tried.enough(tried.best - {one}):
                break
            needed.add(one)
        else:
            return


def _exchange(tried: _Tried[T]) -> bool:
    """Try sets of one member fewer than the best that should almost be as good as the one predicted: is one enough?"""
    falling, count = tried.falling(), len(tried.best) - 1
    items = list(falling)
    inner, outer = items[max(0, count - _NEAR) : count], items[count : count + _NEAR]
    for old, new in sorted(((i, j) for i in inner for j in outer), key=lambda two: falling[two[0]] - falling[two[1]]):
        if tried.enough(frozenset(items[:count]) - {old} | {new}):
            return True
    return False
