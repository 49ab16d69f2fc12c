"""Where independent units of work run: processes of this machine, or the machines of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import psutil

from vdq_export.calib import workers as processes
from vdq_export.errors import EngineError, nearest

LOCAL, RAY = "local", "ray"


def cores() -> int:
    """Of this machine, that this process may use; threads of one core count once."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


class Engine(AbstractContextManager["Engine"], Protocol):
    """is_remote: units run elsewhere, so that what they share has to be sent; else this machine's cores are theirs."""

    is_remote: bool

    def in_order(
        self,
        function: Callable[..., Any],
        tasks: Iterable[Any],
        *,
        name: Callable[[Any], str],
        is_light: Callable[[Any], bool] = ...,
        shared: Any = None,
        cores: int = 1,
    ) -> Iterator[Any]:
        """function(task) of every task, or function(shared, task) where something is shared; in order.

        The same numbers on every engine: units run with one BLAS thread each. A light task is solved in this process.
        Tasks are drawn as there is room for them; cores: how many a task keeps busy, where that is planned with.
        `function` must be importable by name; shared is sent once a process or machine. An error of a task is raised
        when its turn comes, after which nothing more is done; CalibrationError, with the task's name, where its process
        was lost for good.
        """
        ...


@dataclass
class Local:
    """Processes of this machine (calib/workers.py)."""

    workers: int = 1
    is_remote = False

    def in_order(
        self,
        function: Callable[..., Any],
        tasks: Iterable[Any],
        *,
        name: Callable[[Any], str],
        is_light: Callable[[Any], bool] = lambda task: False,
        shared: Any = None,
        cores: int = 1,
    ) -> Iterator[Any]:
        return processes.in_order(function, tasks, self.workers, name=name, is_light=is_light, shared=shared)

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Processes end with the tasks they were started for."""


def load(name: str, workers: int = 1) -> Engine:
    """ "local" with so many processes, "ray" (the cluster this machine belongs to, else one of its own with so many
    processes) or "ray://HOST:PORT". A context manager: leaving it ends what it started.

    Raises EngineError for another name, MissingToolError without Ray, EngineError where no cluster answers.
    """
    if name == LOCAL:
        return Local(workers)
    if name == RAY or name.startswith("ray://"):
        from vdq_export.work.ray import Ray

        return Ray("" if name == RAY else name, workers)
    raise EngineError(f"unknown engine {name!r}", hint=nearest(name, (LOCAL, RAY, "ray://HOST:PORT")))
