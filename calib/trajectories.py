"""A model's trajectories by number: so that one that was run already need not be made again."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Protocol, runtime_checkable

import torch

from vdq_export import work_store
from vdq_export.graph import Array
from vdq_export.model import Model, Trajectory


@runtime_checkable
class Keyed(Protocol):
    """Trajectories that are made when asked for, and can say beforehand what they depend on.

    keys(): one text each; as long as it and the model's weights are the same, so is the trajectory, to the last bit.
    """

    def keys(self) -> tuple[str, ...]: ...

    def __getitem__(self, number: int) -> Trajectory: ...


class Runs:
    """The trajectories of `model`, in order; `keyed` where they can be asked for one by one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._all = model.iter_trajectories()
        self.keyed: Keyed | None = self._all if isinstance(self._all, Keyed) else None
        self.count = len(self._all) if isinstance(self._all, Sized) else None

    def chain(self, count: int, start: str) -> str | None:
        """Key of the first `count` trajectories behind `start`; None where there are fewer."""
        link, every = start, iter(self.keyed.keys() if self.keyed is not None else self._digests())
        for _ in range(count):
            one = next(every, None)
            if one is None:
                return None
            link = work_store.key(link, one)
        return link

    def link(self, before: str, number: int, trajectory: Trajectory) -> str:
        """Key of the trajectories up to `number`, given that of those before it."""
        return work_store.key(before, digest(trajectory) if self.keyed is None else self.keyed.keys()[number])

    def since(self, number: int) -> Iterator[Trajectory]:
        """From `number` on."""
        if self.keyed is not None:
            yield from (self.keyed[later] for later in range(number, len(self.keyed.keys())))
            return
        for other, trajectory in enumerate(self._model.iter_trajectories()):
            if other >= number:
                yield trajectory

    def _digests(self) -> Iterator[str]:
        return (digest(one) for one in self._model.iter_trajectories())


def digest(trajectory: Trajectory) -> str:
    """Over every step's timestep, branch and inputs."""
    steps = [(step["t"], step["branch"], {n: _plain(x) for n, x in step["inputs"].items()}) for step in trajectory]
    return work_store.key(steps)


def _plain(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], Array]:
    raw: Array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), raw
