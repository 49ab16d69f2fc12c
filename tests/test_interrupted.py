"""Ctrl-C and kill at any moment leave no bundle rather than half a one, and nothing that hinders the next export."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_model
from tests.commands import MODEL, command, finish, start
from vdq_export.bundle import Bundle

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


def partial_there(folder: Path) -> bool:
    return any(folder.glob("out.partial-*"))


def graphs_there(folder: Path) -> bool:
    return any(folder.glob("out.partial-*/graphs/*.onnx"))


def wait_for(condition: Callable[[Path], bool], folder: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition(folder):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@posix
@pytest.mark.parametrize(
    ("condition", "later", "sent"),
    [
        (partial_there, 0.0, signal.SIGINT),
        (partial_there, 3.0, signal.SIGTERM),
        (graphs_there, 0.0, signal.SIGINT),
    ],
    ids=["start", "work", "write"],
)
def test_ctrl_c_and_terminate_leave_no_bundle(
    condition: Callable[[Path], bool], later: float, sent: signal.Signals, tmp_path: Path
) -> None:
    process = start(MODEL, "--tsw", "all", "--out", "out", cwd=tmp_path)
    wait_for(condition, tmp_path, process)
    time.sleep(later)
    process.send_signal(sent)
    code, out, err = finish(process)
    if code == 0:  # it had finished before the signal reached it
        Bundle.open(tmp_path / "out")
        return
    assert (code, out) == (128 + sent, "")
    left = [place.name for place in tmp_path.iterdir()]
    assert left in ([], ["out.work"]), "at most what is finished, for the next one to go on from"
    on = "; the same command goes on from out.work" if left else ""
    word = "interrupted" if sent == signal.SIGINT else "terminated"
    assert err.strip() == f"{word}; no bundle was written{on}"


@posix
def test_kill_at_any_moment_leaves_no_bundle_and_the_next_export_works(made: Path, tmp_path: Path) -> None:
    """SIGKILL while starting, working and writing; then one export that also clears what the dead ones left."""
    moments = np.random.default_rng().uniform(0.0, 6.0, 2)
    record = made / "record.safetensors"
    for condition, later in [(partial_there, float(m)) for m in moments] + [(graphs_there, 0.0)]:
        process = start(MODEL, "--tsw", "all", "--calibration", record, "--out", "out", cwd=tmp_path)
        wait_for(condition, tmp_path, process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=later)
        process.kill()
        code, _, err = finish(process)
        assert code in (0, -signal.SIGKILL), err
        if (tmp_path / "out").exists():
            assert code == 0 or len(Bundle.open(tmp_path / "out").schedule.bins) == len(tiny_model.TIMESTEPS)
            shutil.rmtree(tmp_path / "out")
        else:
            assert code != 0, f"killed {later:.2f} s after it began"
    code, _, err = command(MODEL, "--tsw", "2", "--calibration", record, "--out", "out", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    Bundle.open(tmp_path / "out")
