"""Chains of Reshape and Transpose as permutations of atoms: axes that no node of the chain cuts.

A chain is one or several *moves*: lay the elements out as [sizes], permute those axes by `order`. Between two moves the
elements are one flat row. Axes of length 1 do not count, and neighbours that stay neighbours are one axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations

Move = tuple[tuple[int, ...], tuple[int, ...]]  # sizes before, order: axis i afterwards was axis order[i]


class Layout:
    """Where the elements of a value went; fed with the nodes of a chain in order."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.moves: list[Move] = []
        self._start(shape)

    def _start(self, shape: Sequence[int]) -> None:
        self._sizes = list(shape)
        self._axes = [[index] for index in range(len(shape))]  # current axes, each a list of atoms

    def reshape(self, shape: Sequence[int]) -> None:
        grouped = self._regroup(shape)
        if grouped is None:  # it cuts an atom: what came before is a move of its own
            self._finish()
            self._start(shape)
        else:
            self._axes = grouped

    def transpose(self, perm: Sequence[int]) -> None:
        self._axes = [self._axes[index] for index in perm]

    def done(self) -> list[Move]:
        """The moves, without those that move nothing."""
        self._finish()
        return [move for move in self.moves if len(move[0]) > 1]

    def _finish(self) -> None:
        self.moves.append(merged(self._sizes, [atom for axis in self._axes for atom in axis]))

    def _regroup(self, shape: Sequence[int]) -> list[list[int]] | None:
        """The atoms as axes of `shape`, atoms split where that is possible; None where it is not."""
        waiting = [atom for axis in self._axes for atom in axis]
        sizes, cuts, axes = list(self._sizes), dict[int, list[int]](), list[list[int]]()
        for length in shape:
            axis: list[int] = []
            while length > 1:
                if not waiting:
                    return None
                atom = waiting.pop(0)
                if sizes[atom] > length:
                    if sizes[atom] % length:
                        return None
                    sizes.append(sizes[atom] // length)
                    sizes[atom] = length
                    waiting.insert(0, len(sizes) - 1)
                    cuts.setdefault(atom, []).append(len(sizes) - 1)
                if length % sizes[atom]:
                    return None
                length //= sizes[atom]
                axis.append(atom)
            axes.append(axis)
        self._renumber(sizes, cuts, axes)
        return axes

    def _renumber(self, sizes: list[int], cuts: dict[int, list[int]], axes: list[list[int]]) -> None:
        """Number the atoms in source order again after some were split."""

        def spread(atom: int) -> Iterator[int]:
            yield atom
            for part in cuts.get(atom, []):
                yield from spread(part)

        order = [part for atom in range(len(self._sizes)) for part in spread(atom)]
        place = {atom: index for index, atom in enumerate(order)}
        self._sizes = [sizes[atom] for atom in order]
        for axis in axes:
            axis[:] = [place[atom] for atom in axis]


def merged(sizes: Sequence[int], order: Sequence[int]) -> Move:
    """The same permutation of the fewest axes; of ((n,), (0,)) when nothing moves."""
    order = [atom for atom in order if sizes[atom] != 1]
    rank = {atom: index for index, atom in enumerate(sorted(order))}
    kept = [sizes[atom] for atom in sorted(order)]
    runs: list[list[int]] = []
    for atom in (rank[atom] for atom in order):
        if runs and runs[-1][-1] + 1 == atom:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    by_start = sorted(runs)
    lengths = []
    for run in by_start:
        lengths.append(1)
        for atom in run:
            lengths[-1] *= kept[atom]
    return tuple(lengths), tuple(by_start.index(run) for run in runs)


def steps(move: Move, limit: int) -> list[Move]:
    """`move` as moves of at most `limit` axes each, greedily: each leaves the fewest axes for those after it."""
    found = []
    sizes, order = move
    while len(sizes) > limit:
        step, rest = min(_candidates(sizes, order, limit), key=lambda pair: len(pair[1][0]))
        found.append(step)
        sizes, order = rest
    return [*found, (sizes, order)] if len(sizes) > 1 else found


def _candidates(sizes: Sequence[int], order: Sequence[int], limit: int) -> Iterator[tuple[Move, Move]]:
    """(a move of `limit` groups of neighbouring axes, what is left to do after it)."""
    count = len(sizes)
    for cuts in combinations(range(1, count), limit - 1):
        groups = [list(range(a, b)) for a, b in pairwise((0, *cuts, count))]
        for perm in permutations(range(limit)):
            now = [axis for index in perm for axis in groups[index]]
            place = {axis: index for index, axis in enumerate(now)}
            rest = merged([sizes[axis] for axis in now], [place[axis] for axis in order])
            lengths = []
            for group in groups:
                lengths.append(1)
                for axis in group:
                    lengths[-1] *= sizes[axis]
            yield (tuple(lengths), perm), rest
