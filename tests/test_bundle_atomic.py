"""A bundle is written whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import full_disk
from tests.tiny_bundle import WEIGHT, files, fill, graph, names, write
from vdq_export import bundle_writer
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import BundleError
from vdq_export.weights.store import WeightStore

WEIGHTS = "graphs/weights/weights.bin"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), BundleWriter(tmp_path / "out") as writer:
        writer.add_graph("body", *graph(1.0))
        raise error
    assert names(tmp_path) == []


def test_forgetting_to_commit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="was not written"), BundleWriter(tmp_path / "out") as writer:
        writer.add_graph("body", *graph(1.0))
    assert names(tmp_path) == []


def test_a_full_disk_at_any_flush_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in full_disk.at_each_flush(monkeypatch, most=20):
        try:
            write(tmp_path / "out")
        except BundleError as error:
            assert full_disk.MESSAGE in str(error)
            # The rename is the moment of truth: a flush that fails after it finds a whole bundle in place.
            if names(tmp_path):
                Bundle.open(tmp_path / "out")
                shutil.rmtree(tmp_path / "out")
        else:
            assert limit > 5
            break
    assert names(tmp_path) == ["out"]


def test_a_full_disk_while_weights_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, full_disk.MESSAGE)

    monkeypatch.setattr(WeightStore, "_write", full)
    with pytest.raises(BundleError, match=full_disk.MESSAGE):
        write(tmp_path / "out")
    assert names(tmp_path) == []


KILLED = """
import sys
sys.path[:0] = [{root!r}]
from pathlib import Path
from tests.tiny_bundle import fill
from vdq_export import bundle_writer
from vdq_export.bundle_writer import BundleWriter
import time
def stop(*_):
    print("here", flush=True)
    time.sleep(60)
{patch}
with BundleWriter(Path({out!r}), force=True) as writer:
    fill(writer)
"""


@pytest.mark.parametrize(
    "patch",
    [
        "BundleWriter.commit = stop",  # graphs are there, nothing else
        "BundleWriter._put_in_place = stop",  # everything is there but the rename
        "real = Path.rename; Path.rename = lambda a, b: (real(a, b), stop())",  # the old one aside, the new one not in
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_kill_nine_leaves_no_half_bundle_and_the_next_export_clears_up(
    tmp_path: Path, patch: str, before: bool
) -> None:
    out = tmp_path / "out"
    if before:
        write(out, weight=WEIGHT + 1)
    script = KILLED.format(root=str(Path(__file__).parents[1]), patch=patch, out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.kill()  # SIGKILL, where there are signals
    process.wait()
    process.stdout.close()
    if out.exists():
        Bundle.open(out)
    elif before:
        assert any(".replaced-" in name for name in names(tmp_path))  # the old one is not lost
    write(out, force=True)
    assert names(tmp_path) == ["out"]
    assert (out / WEIGHTS).read_bytes() == WEIGHT.tobytes()


def test_an_old_bundle_moved_aside_by_a_dead_process_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    out.rename(tmp_path / f"out.replaced-{bundle_writer._host()}-{int(dead.stdout)}-0123abcd")
    with pytest.raises(BundleError, match="exists"):
        write(out)
    assert names(tmp_path) == ["out"]
    Bundle.open(out)


def test_of_two_exports_at_once_the_first_to_finish_wins(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists"), BundleWriter(tmp_path / "out") as slow:
        slow.add_graph("body", *graph(1.0))
        write(tmp_path / "out")
        assert len(names(tmp_path)) == 2  # the folder of a living process is left alone
        fill(slow)
    Bundle.open(tmp_path / "out")
    assert names(tmp_path) == ["out"]


# -- force -----------------------------------------------------------------------------------------------------------


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    write(tmp_path / "out", weight=WEIGHT + 1)
    with pytest.raises(BundleError, match="--force"):
        write(tmp_path / "out")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == WEIGHT.tobytes()
    assert names(tmp_path) == ["out"]


def test_force_takes_an_empty_folder_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text('{"name": "a web extension"}')
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("mine", "file", "link"):
        with pytest.raises(BundleError):
            write(tmp_path / name, force=True)
    assert names(tmp_path / "mine") == ["manifest.json"]
    assert (tmp_path / "file").read_text() == "precious"
    Bundle.open(tmp_path / "empty")


def test_a_failed_replacement_keeps_the_old_bundle(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), BundleWriter(tmp_path / "out", force=True) as writer:
        writer.add_graph("body", *graph(3.0))
        raise KeyboardInterrupt
    assert files(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]
