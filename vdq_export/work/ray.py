"""Units on a Ray cluster. Ray is an extra; nothing of it is imported before a cluster is asked for."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, redirect_stdout
from types import TracebackType
from typing import Any

from vdq_export.calib.workers import ONE_THREAD
from vdq_export.errors import CalibrationError, EngineError, MissingToolError

RETRIES = 3  # of a unit whose process or machine was lost
AHEAD = 2  # units handed over for each core: one runs, the next is there when it is done


class Ray:
    """The cluster at `address` ("ray://HOST:PORT"); "": the one this machine belongs to, else one of this machine
    alone, with `workers` processes, that ends with this engine.

    Machines of a cluster need this package in the same version. Where the disk of this one is not theirs, they need
    nothing from it: units are sent over. Raises MissingToolError without Ray, EngineError where no cluster answers.
    """

    is_remote = True

    def __init__(self, address: str = "", workers: int = 1) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before it is imported: nobody is told of this export
        try:
            import ray
        except ImportError as error:
            raise MissingToolError("--engine ray needs Ray", hint="pip install 'vdq-export[ray]'") from error
        self._ray: Any = ray
        self._address, self._workers = address, workers
        self._stack = ExitStack()
        self._remote: Any = None

    def __enter__(self) -> Ray:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(sys.stderr))  # where Ray's words about lost processes belong
            environment = {**ONE_THREAD, "RAY_USAGE_STATS_ENABLED": "0"}
            if not self._ray.is_initialized():
                stack.callback(self._ray.shutdown)
                if self._connect():  # a cluster of this machine finds what this process finds
                    environment["PYTHONPATH"] = os.pathsep.join(one for one in sys.path if one)
            settings = {"num_cpus": 1, "max_retries": RETRIES, "runtime_env": {"env_vars": environment}}
            self._remote = self._ray.remote(**settings)(_call)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

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
        """As Engine.in_order() says. A unit whose process or machine is lost is done again, RETRIES times."""
        before = () if shared is None else (self._ray.put(shared),)
        remote = self._remote if cores == 1 else self._remote.options(num_cpus=min(cores, self._largest()))
        drawn, running, left = iter(tasks), deque[tuple[str, Any]](), True
        try:
            while left or running:
                while left and len(running) < self._room():
                    task = next(drawn, _END)
                    if task is _END:
                        left = False
                    elif is_light(task):
                        own = () if shared is None else (shared,)
                        running.append(("", function(*own, task)))
                    else:
                        running.append((name(task), remote.remote(function, task, *before)))
                if running:
                    called, unit = running.popleft()
                    yield self._answer(called, unit) if called else unit
        finally:
            for called, unit in running:
                if called:
                    self._ray.cancel(unit, force=True)

    def _room(self) -> int:
        return max(1, AHEAD * int(self._ray.cluster_resources().get("CPU", 1)))

    def _largest(self) -> int:
        """Cores of the machine that has the most."""
        return (
            max((int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]), default=1) or 1
        )

    def _answer(self, called: str, unit: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(unit)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except errors.RayError as error:
            raise CalibrationError(
                f"{called} was lost {RETRIES + 1} times with its process or machine ({type(error).__name__})",
                hint="fewer units at once need less memory; finished ones are kept",
            ) from error

    def _connect(self) -> bool:
        """Whether a cluster was started for it."""
        settings: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            try:
                self._ray.init(address=self._address or "auto", **settings)
                return False
            except ConnectionError:
                if self._address:
                    raise
                self._ray.init(address="local", num_cpus=self._workers, include_dashboard=False, **settings)
                return True
        except (ConnectionError, OSError, RuntimeError, ValueError, ImportError) as error:
            where = f"at {self._address}" if self._address else "on this machine"
            why = " ".join(str(error).split()) or type(error).__name__
            raise EngineError(f"no Ray cluster {where}: {why}", hint="`ray status` says what there is") from error


_END = object()


def _call(function: Callable[..., Any], task: Any, *before: Any) -> Any:
    """In a process of the cluster."""
    return function(*before, task)
