"""Units of work with a memory: what a store holds is not done again, the rest runs on an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from vdq_export.work import store as work_store
from vdq_export.work.engine import Engine
from vdq_export.work.store import WorkStore

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    engine: Engine,
    store: WorkStore | None,
    function: Callable[[T], R],
    tasks: Iterable[T],
    kind: type[R],
    *,
    name: Callable[[T], str],
    is_light: Callable[[T], bool] = lambda task: False,
    is_worth: Callable[[T], bool] = lambda task: True,
) -> Iterator[R]:
    """engine.in_order(), with the results of type `kind` that are in `store` taken from it and the others put there.

    is_worth: whether doing a task takes so much longer than reading its input that it is kept.
    """
    keys: deque[str] = deque()  # of the tasks drawn, in their order; "" for those that are not kept

    def units() -> Iterator[_Unit]:
        for task in tasks:
            key = work_store.key(function.__qualname__, task) if store is not None and is_worth(task) else ""
            known = store.get(key) if store is not None and key else None
            keys.append(key)
            yield _Unit(task if known is None else None, known)

    results = engine.in_order(
        _Do(function),
        units(),
        name=lambda unit: name(unit.task),
        is_light=lambda unit: unit.known is not None or is_light(unit.task),
    )
    for result in results:
        key = keys.popleft()
        if isinstance(result, _Known):
            result = result.as_(kind)
        elif store is not None and key:
            store.put(key, work_store.encode(result))
        yield result


@dataclass(frozen=True)
class _Unit:
    """A task, or the bytes of its result."""

    task: Any
    known: bytes | None


@dataclass(frozen=True)
class _Known:
    data: bytes

    def as_(self, kind: type[R]) -> R:
        return work_store.decode(self.data, kind)


@dataclass(frozen=True)
class _Do:
    """The function, for tasks whose result is known too."""

    function: Callable[[Any], Any]

    def __call__(self, unit: _Unit) -> Any:
        return self.function(unit.task) if unit.known is None else _Known(unit.known)


def once(store: WorkStore | None, key: str, compute: Callable[[], R], kind: type[R]) -> R:
    """compute(), unless `store` has its result."""
    data = None if store is None else store.get(key)
    if data is not None:
        try:
            return work_store.decode(data, kind)
        except msgspec.MsgspecError:
            pass  # whatever it is, it is not what this code keeps
    result = compute()
    if store is not None:
        store.put(key, work_store.encode(result))
    return result
