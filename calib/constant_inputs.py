"""Which inputs of a network no step changes: what depends on them alone is computed once a video.

An input is constant where all steps of a guidance branch of one trajectory have it equal to the last bit. Found while
trajectories are read for calibration; a trajectory none of whose branches has two steps shows nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vdq_export.model import Step


class Constancy:
    """Sees the steps of one trajectory; holds one step's inputs of each branch."""

    def __init__(self) -> None:
        self._first: dict[str, dict[str, torch.Tensor]] = {}
        self._constant: set[str] | None = None

    def see(self, step: Step) -> None:
        first = self._first.setdefault(step["branch"], step["inputs"])
        if first is step["inputs"]:
            return
        same = {name for name, tensor in step["inputs"].items() if name in first and _equal(first[name], tensor)}
        self._constant = same if self._constant is None else self._constant & same

    @property
    def names(self) -> tuple[str, ...] | None:
        """Sorted; None where the steps show nothing."""
        return None if self._constant is None else tuple(sorted(self._constant))


def in_all(trajectories: Iterable[tuple[str, ...] | None], timestep_input: str) -> tuple[str, ...]:
    """Names that are constant in every trajectory that shows anything, sorted; the timestep never is one of them."""
    shown = [set(names) for names in trajectories if names is not None]
    return tuple(sorted(set.intersection(*shown) - {timestep_input})) if shown else ()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
