"""How far long work is: bars for people, lines for machines, nothing into pipes, and how long it will take."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests import tiny_model
from tests.commands import assert_one_line, command
from vdq_export import compiler
from vdq_export.commands.options import reporter, verbosity
from vdq_export.graph import Graph
from vdq_export.progress import Advance, JsonReporter, Pace, Reporter, TerminalReporter, piece


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_time_left_is_what_the_last_steps_took() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.at(0, None)
    assert pace.left is None
    for done in range(1, 31):  # thirty results from a store, in no time
        pace.at(done, 60)
    for done in range(31, 51):  # then work, two seconds each
        clock.now += 2.0
        pace.at(done, 60)
    assert pace.left == pytest.approx(20.0) and pace.seconds == pytest.approx(40.0)
    clock.now += 0.5
    assert pace.left == pytest.approx(19.5), "it runs on between two steps"
    clock.now += 100.0
    assert pace.left == 0.0
    pace.at(60, 60)
    assert pace.left == 0.0


def test_pieces_of_one_stage() -> None:
    told: list[tuple[int, int | None]] = []
    second = piece(lambda done, total: told.append((done, total)), 1, 3)
    second(0, 4)
    second(4, 4)
    second(2, None)
    assert told == [(4, 12), (8, 12), (2, None)]


def lines(capture: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    out, err = capture.readouterr()
    assert out == ""
    return [json.loads(line) for line in err.splitlines()]


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    told = JsonReporter(1, clock=clock)
    with told.stage("solve") as advance:
        for done in range(1, 5):
            clock.now += 0.15
            advance(done, 4)
        told.note("detail")
        told.warn("beware")
    first, second, note, warning, last = lines(capsys)
    assert first == {"stage": "solve", "done": 0, "total": None, "seconds": 0.0, "seconds_left": None}
    assert second == {"stage": "solve", "done": 2, "total": 4, "seconds": 0.3, "seconds_left": 0.3}, "not every step"
    assert (note, warning) == ({"note": "detail"}, {"warning": "beware"})
    assert last == {"stage": "solve", "done": 4, "total": 4, "seconds": 0.6, "seconds_left": 0.0}


def test_a_stage_that_fails_never_says_that_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), JsonReporter().stage("trace"):
        raise RuntimeError
    assert [line["done"] for line in lines(capsys)] == [0]


def shown(monkeypatch: pytest.MonkeyPatch, work: Callable[[Reporter], None], **kind: Any) -> str:
    """What a terminal gets."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    work(TerminalReporter(**kind))
    return terminal.getvalue()


def test_a_terminal_that_cannot_draw_gets_a_line_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "dumb")
    with TerminalReporter().stage("solve"), TerminalReporter(-1).stage("quiet"):
        pass
    assert terminal.getvalue() == "solve …\n"


def nested(told: Reporter) -> None:
    with told.stage("measure"):
        for name in ("first export", "second export"):
            with told.stage(name) as advance:
                advance(3, 7)


def test_stages_within_stages_share_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, nested)
    assert all(word in text for word in ("measure", "1/1"))
    assert "left" in shown(monkeypatch, lambda told: _half(told))


def _half(told: Reporter) -> None:
    with told.stage("half") as advance:
        advance(3, 7)
        told._progress.refresh()  # type: ignore[attr-defined]  # no waiting for the display's own clock


def test_nothing_goes_into_pipes_or_to_those_who_want_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI sets it, where no terminal is
    nested(TerminalReporter())
    assert capsys.readouterr() == ("", "")
    assert shown(monkeypatch, nested, verbosity=-1) == ""
    assert shown(monkeypatch, nested, bars=False) == ""


@click.command()
@verbosity
def working(verbose: int, quiet: bool) -> None:
    nested(reporter(verbose, quiet))


def test_the_option_chooses() -> None:
    def stages(*arguments: str) -> list[str]:
        done = CliRunner().invoke(working, arguments)
        assert (done.exit_code, done.stdout) == (0, "")
        return [json.loads(line)["stage"] for line in done.stderr.splitlines()]

    order = ["measure", "first export", "first export", "second export", "second export", "measure"]
    assert stages("--progress", "json") == order
    assert stages("--progress", "json", "-q") == stages("--progress", "none") == stages() == []


def test_a_real_command_speaks_json(tmp_path: Any) -> None:
    recording = ("record", tmp_path, "--prompt-embeds", __file__, "--progress", "jsn")
    assert_one_line(command(*recording, cwd=tmp_path), "unknown style of progress 'jsn'", "json")


class Heard(Reporter):
    """Remembers every stage with what it told."""

    def __init__(self) -> None:
        self.stages: dict[str, list[tuple[int, int | None]]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Advance]:
        told = self.stages.setdefault(name.strip(), [])
        yield lambda done, total: told.append((done, total))


def test_stages_of_an_export_know_their_totals(traced: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "trace", lambda model, **_: traced.copy())
    heard = Heard()
    compiler.export(tiny_model.build(), tsw=2, out=tmp_path / "b", reporter=heard, page=False)
    assert list(heard.stages) == ["trace", "calibrate", "solve", "quantize", "hoist", "write"]
    assert heard.stages["calibrate"][-1] == (24, 24) and heard.stages["quantize"] == [(1, 2), (2, 2)]
    done, total = zip(*heard.stages["solve"], strict=True)
    assert list(done) == sorted(done) and set(total) == {done[-1]} and heard.stages["hoist"] == [(1, 1)]
