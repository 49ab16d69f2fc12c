"""Where and with what memory an export works: an engine, and a store of finished units."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vdq_export.work import engine as engines
from vdq_export.work.engine import Engine
from vdq_export.work.store import WorkStore


@dataclass(frozen=True)
class Work:
    """store: None where nothing is kept."""

    engine: Engine
    store: WorkStore | None = None


@contextmanager
def at_work(
    out: str | Path | None = None,
    *,
    work: Work | str | Path | None = None,
    engine: str = engines.LOCAL,
    workers: int | None = None,
) -> Iterator[Work]:
    """What an export to `out` works with: `work` itself; or the folder it names, which is kept; or "OUT.work", which is
    removed once the block is left without an error. Neither `work` nor `out`: nothing is kept.

    engine, workers: as engine.load() takes them, one worker a core by default. Raises what that raises.
    """
    if isinstance(work, Work):
        yield work
        return
    with engines.load(engine, workers or os.cpu_count() or 1) as running:
        if work is None and out is None:
            yield Work(running)
            return
        place = Path(os.path.abspath(out or ""))  # noqa: PTH100  (of a link, the link; of "." its name)
        with WorkStore(work or place.parent / f"{place.name}.work") as store:
            yield Work(running, store)
            if work is None:
                store.clear()
