"""`python -m tests.resume_cases FOLDER`: exports of one model that are killed at POINTS, one after the other.

A process a moment, forked from one that has imported and traced everything: FOLDER/out is what the last one, which
nobody kills, makes of what the others left, FOLDER/whole what one makes without interruption. A JSON line each says how
it ended and which keys it took from the store of finished work and put there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny_model
from vdq_export import export
from vdq_export.bundle_writer import BundleWriter
from vdq_export.calib import group, observe
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.trace import trace
from vdq_export.work import store as work_store
from vdq_export.work.store import WorkStore

SETTINGS: dict[str, Any] = {"tsw": 2, "recipe": "svdquant-gptq", "workers": 1}
# When SIGKILL comes: the function, at which of its calls, and whether before it or after it has returned.
POINTS: dict[str, tuple[type, str, int, bool]] = {
    "while the first trajectory's result is renamed": (Path, "replace", 1, False),
    "between the trajectories": (WorkStore, "put", 1, True),
    "after the last trajectory": (WorkStore, "put", 1, True),
    "in the first group of layers": (WorkStore, "put", 1, False),
    "after two groups": (WorkStore, "put", 2, True),
    "while the first graph is written": (BundleWriter, "add_file", 1, False),
    "before the bundle is put in place": (BundleWriter, "_put_in_place", 1, False),
}


def main(folder: Path) -> None:
    model = tiny_model.build()
    graph = trace(model)
    work_store.code_version()  # once for all, as of these sources
    group.LIGHT = 0  # every group in a process of its own, and kept
    observe.WORTH = 0
    for point in POINTS:
        attempt(model, graph, folder / "out", point)
    attempt(model, graph, folder / "out", "")
    attempt(model, graph, folder / "whole", "")


def attempt(model: Model, graph: Graph, out: Path, point: str) -> None:
    """An export to `out` in a process that is killed at `point`."""
    log = out.with_name("log")
    if not (child := os.fork()):
        try:
            _watch(log)
            if point:
                _kill_at(*POINTS[point])
            export(model, traced={"": graph.copy()}, out=out, **SETTINGS)
        finally:
            os._exit(0 if (out / "manifest.json").is_file() else 1)
    _, status = os.waitpid(child, 0)
    lines = log.read_text().split() if log.is_file() else []
    log.unlink(missing_ok=True)
    found = {what: [line[1:] for line in lines if line[0] == what] for what in ("=", "+")}
    left = sorted(one.name for one in out.parent.iterdir() if one.name.startswith(out.name))
    told = {"point": point, "code": os.waitstatus_to_exitcode(status), "left": left}
    print(json.dumps({**told, "taken": found["="], "put": found["+"]}), flush=True)


def _watch(log: Path) -> None:
    """Write "=KEY" for each entry taken from a store and "+KEY" for each put there."""
    get, put = WorkStore.get, WorkStore.put

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    def getting(self: WorkStore, key: str) -> bytes | None:
        found = get(self, key)
        if found is not None:
            note(f"={key}")
        return found

    def putting(self: WorkStore, key: str, data: bytes) -> None:
        put(self, key, data)
        note(f"+{key}")

    WorkStore.get, WorkStore.put = getting, putting  # type: ignore[method-assign]


def _kill_at(owner: Any, name: str, number: int, after: bool) -> None:
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def called(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = real(*arguments, **settings)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    setattr(owner, name, called)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
