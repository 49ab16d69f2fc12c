"""A model's trajectories by number: so that one that was run already need not be made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from functools import cached_property
from itertools import accumulate, islice
from typing import Protocol, runtime_checkable

import torch

from vdq_export.graph import Array
from vdq_export.model import Model, Trajectory
from vdq_export.work import store as work_store


@runtime_checkable
class Keyed(Protocol):
    """Trajectories that are made when asked for, and can say beforehand what they depend on.

    keys(): one text each; as long as it and the model's weights are the same, so is the trajectory, to the last bit.
    """

    def keys(self) -> tuple[str, ...]: ...

    def __getitem__(self, number: int) -> Trajectory: ...


class Runs:
    """The trajectories of `model`, in order; `keys` where they can be asked for one by one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        every = model.iter_trajectories()
        self._keyed = _Listed(every) if isinstance(every, list | tuple) else every
        self.count = len(every) if isinstance(every, Sized) else None

    @cached_property
    def keys(self) -> tuple[str, ...] | None:
        return self._keyed.keys() if isinstance(self._keyed, Keyed) else None

    def chain(self, start: str, count: int | None = None) -> str | None:
        """Key of the first `count` trajectories behind `start`, or of all; None where there are fewer."""
        links = list(islice(self.links(start), count))
        return None if count is not None and len(links) < count else (links or [start])[-1]

    def links(self, start: str) -> Iterator[str]:
        """Of each trajectory, the key of it and all before it behind `start`."""
        return islice(accumulate(self.keys or self._digests(), work_store.key, initial=start), 1, None)

    def link(self, before: str, number: int, trajectory: Trajectory) -> str:
        """Key of the trajectories up to `number`, given that of those before it."""
        return work_store.key(before, digest(trajectory) if self.keys is None else self.keys[number])

    def since(self, number: int) -> Iterator[Trajectory]:
        """From `number` on."""
        if isinstance(self._keyed, Keyed):
            yield from (self._keyed[later] for later in range(number, len(self.keys or ())))
            return
        yield from islice(self._model.iter_trajectories(), number, None)

    def _digests(self) -> Iterator[str]:
        return (digest(one) for one in self._model.iter_trajectories())


class _Listed:
    """Trajectories that are there already."""

    def __init__(self, every: Sequence[Trajectory]) -> None:
        self._every = every

    def keys(self) -> tuple[str, ...]:
        return tuple(map(digest, self._every))

    def __getitem__(self, number: int) -> Trajectory:
        return self._every[number]


def digest(trajectory: Trajectory) -> str:
    """Over every step's timestep, branch and inputs."""
    steps = [(step["t"], step["branch"], {n: _plain(x) for n, x in step["inputs"].items()}) for step in trajectory]
    return work_store.key(steps)


def _plain(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], Array]:
    raw: Array = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), raw
