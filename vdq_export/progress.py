"""How long work tells where it is: a rich bar on stderr for people, JSON lines there for machines, or nothing at all.

A JSON line is one object: {"stage", "done", "total", "seconds", "seconds_left"}; total and seconds_left are null while
unknown, and the last line of a stage has done = total. Texts are {"note"} (with -v) and {"warning"}.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

Advance = Callable[[int, int | None], None]  # (done, total); total None while unknown
Style = Literal["bar", "json", "none"]

RECENT = 16  # calls of Advance that say how fast it goes: finished work that is only taken from a store is fast
EVERY = 0.2  # seconds between two JSON lines of a stage


class Pace:
    """When a stage will be done, from how fast it went lately; seconds by `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.started, self.done = clock(), 0
        self.total: int | None = None
        self._seen = deque[tuple[float, int]]([(self.started, 0)], maxlen=RECENT)

    def at(self, done: int, total: int | None) -> None:
        """So much is done now."""
        self.done, self.total = done, total
        self._seen.append((self._clock(), done))

    @property
    def seconds(self) -> float:
        """Since the stage began."""
        return self._clock() - self.started

    @property
    def left(self) -> float | None:
        """Seconds still to go; None while nothing says so."""
        if self.total is None:
            return None
        if self.done >= self.total:
            return 0.0
        (began, before), (last, now) = self._seen[0], self._seen[-1]
        if now <= before:
            return None
        each = (last - began) / (now - before)
        return max(each * (self.total - self.done) - (self._clock() - last), 0.0)


def piece(advance: Advance, number: int, of: int) -> Advance:
    """For the `number`-th (from 0) of so many pieces of work of one size, which are one stage together."""
    return lambda done, total: advance(number * (total or 0) + done, None if total is None else of * total)


class Reporter:
    """Silent; the base of those that speak."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        """One long step; the value is called with (done, total) as it goes on. Stages may lie in one another."""
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """A line for people who want detail (-v)."""

    def warn(self, text: str) -> None:
        """A line that everybody should see who did not ask for silence."""


class TerminalReporter(Reporter):
    """Progress bars on stderr where it is a terminal (a dumb one gets a line a stage); notes there when verbose (1), no
    warnings when quiet (-1).
    """

    def __init__(self, verbosity: int = 0, *, bars: bool = True) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        # Not the console's own idea alone: variables as FORCE_COLOR make it take a pipe for a terminal.
        shown = sys.stderr.isatty() and self._console.is_interactive
        self._bars = bars and verbosity >= 0 and shown
        self._lines = bars and verbosity >= 0 and sys.stderr.isatty() and not shown  # a terminal that cannot draw
        self._verbose, self._quiet = verbosity > 0, verbosity < 0
        self._progress: Progress | None = None  # one display holds all stages that are open

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        if not self._bars:
            if self._lines:
                self._console.print(f"{name} …", markup=False, soft_wrap=True)
            yield lambda done, total: None
            return
        outermost = self._progress is None
        progress = self._progress = self._progress or _display(self._console)
        pace = Pace()
        task = progress.add_task(name, total=None, pace=pace)

        def advance(done: int, total: int | None) -> None:
            pace.at(done, total)
            progress.update(task, completed=done, total=total)

        try:
            if outermost:
                progress.start()
            yield advance
            advance(pace.total or 1, pace.total or 1)
        finally:
            if outermost:
                progress.stop()
                self._progress = None
            else:
                progress.remove_task(task)  # else searches that export many times fill the screen

    def note(self, text: str) -> None:
        if self._verbose:
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"note: {text}", markup=False, soft_wrap=True)


class JsonReporter(Reporter):
    """One JSON object a line on stderr: see the module's docstring."""

    def __init__(self, verbosity: int = 0, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._verbose, self._clock = verbosity > 0, clock

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        pace = Pace(self._clock)
        told = _tell_pace(name, pace)

        def advance(done: int, total: int | None) -> None:
            nonlocal told
            pace.at(done, total)
            if self._clock() - told >= EVERY and done != total:
                told = _tell_pace(name, pace)

        yield advance
        pace.at(pace.total or 1, pace.total or 1)
        _tell_pace(name, pace)

    def note(self, text: str) -> None:
        if self._verbose:
            _line(note=text)

    def warn(self, text: str) -> None:
        _line(warning=text)


def reporter(style: Style = "bar", verbosity: int = 0) -> Reporter:
    """The reporter of that style; verbosity: 1 with notes, -1 silent but for errors."""
    if style == "json":
        return JsonReporter(verbosity)
    return TerminalReporter(verbosity, bars=style == "bar")


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        left = task.fields["pace"].left
        if left is None or task.finished:
            return Text("")
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return Text(f"{hours}:{minutes:02d}:{seconds:02d} left" if hours else f"{minutes}:{seconds:02d} left")


def _display(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _TimeLeft())
    return Progress(*columns, console=console)


def _tell_pace(stage: str, pace: Pace) -> float:
    """Print where the stage is; the time of that."""
    left = None if pace.left is None else round(pace.left, 1)
    _line(stage=stage, done=pace.done, total=pace.total, seconds=round(pace.seconds, 1), seconds_left=left)
    return pace.started + pace.seconds


def _line(**facts: Any) -> None:
    print(msgspec.json.encode(facts).decode(), file=sys.stderr, flush=True)
