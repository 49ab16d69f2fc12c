"""How long work tells where it is: a rich bar on stderr for people, nothing at all when piped or quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int, int | None], None]  # (done, total); total None while unknown


class Reporter:
    """Silent; the base of those that speak."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """One long step; the value is called with (done, total) as it goes on."""
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """A line for people who want detail (-v)."""

    def warn(self, text: str) -> None:
        """A line that everybody should see who did not ask for silence."""


class TerminalReporter(Reporter):
    """Progress bars on stderr where it is a terminal; notes there when verbose."""

    def __init__(self, verbosity: int = 0) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._bars = verbosity >= 0 and self._console.is_terminal
        self._verbose, self._quiet = verbosity > 0, verbosity < 0

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        if not self._bars:
            yield lambda done, total: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
            task_now = progress.tasks[0]
            progress.update(task, total=task_now.total or 1, completed=task_now.total or 1)

    def note(self, text: str) -> None:
        if self._verbose:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"note: {text}", markup=False, soft_wrap=True)
