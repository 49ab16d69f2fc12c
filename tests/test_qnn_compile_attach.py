"""Adding contexts to a finished bundle: all of them or none, whatever happens, and nothing outside the bundle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from tests import full_disk
from tests.tiny_bundle import files, names, write
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import scratch
from vdq_export.errors import BundleError

MODEL, BINARY = "contexts/v75/body_ctx.onnx", "contexts/v75/body_ctx_qnn.bin"


def context(binary: str) -> bytes:
    """An ONNX model as the compiler writes it, that refers to `binary`."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    node = helper.make_node(
        "EPContext", ["x"], ["y"], "ctx", domain="com.microsoft", embed_mode=0, ep_cache_context=binary
    )
    made: bytes = helper.make_model(helper.make_graph([node], "ctx", ends[:1], ends[1:])).SerializeToString()
    return made


def add(bundle: Bundle, folder: Path, text: bytes = b"binary") -> Bundle:
    """Both files, the binary by moving it in."""
    place = folder / "made.bin"
    place.write_bytes(text)
    return bundle.attach_files({MODEL: context("body_ctx_qnn.bin"), BINARY: place}, clear=["contexts/v75/"])


def test_files_are_listed_with_their_hashes(tmp_path: Path) -> None:
    made = add(write(tmp_path / "out"), tmp_path)
    assert {MODEL, BINARY} <= {entry.path for entry in made.manifest.files}
    assert Bundle.open(tmp_path / "out").manifest == made.manifest
    assert not (tmp_path / "made.bin").exists()


def test_clear_takes_away_what_was_there(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out").attach_files({"contexts/v75/old.bin": b"1", "contexts/v79/kept.bin": b"2"})
    made = add(bundle, tmp_path)
    listed = {entry.path for entry in made.manifest.files if entry.path.startswith("contexts/")}
    assert listed == {MODEL, BINARY, "contexts/v79/kept.bin"}
    assert not (tmp_path / "out/contexts/v75/old.bin").exists()
    Bundle.open(tmp_path / "out")


def test_a_full_disk_at_any_flush_leaves_a_valid_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = add(write(tmp_path / "out"), tmp_path, b"first")
    for limit in full_disk.at_each_flush(monkeypatch, most=10):
        try:
            bundle = add(bundle, tmp_path, b"second, longer")
        except BundleError as error:
            assert full_disk.MESSAGE in str(error)
            bundle = Bundle.open(tmp_path / "out")
            have = {entry.path for entry in bundle.manifest.files if entry.path.startswith("contexts/")}
            assert have in (set(), {MODEL, BINARY})
            if have:  # nothing was begun: the old ones are whole
                assert (tmp_path / "out" / BINARY).read_bytes() == b"first"
        else:
            assert limit >= 3
            break
    assert (tmp_path / "out" / BINARY).read_bytes() == b"second, longer"


@pytest.mark.parametrize(
    "path", ["graphs/more.onnx", "manifest.json", "contexts/../graphs/x", "/contexts/x", "context"]
)
def test_other_places_are_refused(tmp_path: Path, path: str) -> None:
    bundle = write(tmp_path / "out")
    before = files(tmp_path)
    with pytest.raises(BundleError):
        bundle.attach_files({path: b"x"})
    with pytest.raises(BundleError):
        bundle.attach_files({}, clear=[path])
    assert files(tmp_path) == before


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/contexts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        add(bundle, tmp_path)
    assert names(tmp_path / "elsewhere") == []


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    bundle = add(write(tmp_path / "out"), tmp_path)
    (tmp_path / "out/contexts").rename(tmp_path / "elsewhere")
    (tmp_path / "out/contexts").symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        bundle.attach_files({}, clear=["contexts/v75/"])
    assert files(tmp_path / "elsewhere") == before


def test_a_bundle_that_was_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    write(tmp_path / "out", force=True, group=2)
    with pytest.raises(BundleError, match="replaced meanwhile"):
        add(bundle, tmp_path)
    Bundle.open(tmp_path / "out")


def test_what_others_added_meanwhile_stays(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    bundle.attach("report/note.txt", b"note")
    assert add(bundle, tmp_path).manifest.file("report/note.txt") is not None


@pytest.mark.parametrize("binary", ["../../graphs/weights/weights.bin", "/etc/passwd", "missing.bin", ""])
def test_contexts_that_refer_elsewhere_do_not_open(tmp_path: Path, binary: str) -> None:
    write(tmp_path / "out").attach_files({MODEL: context(binary)})
    with pytest.raises(BundleError, match=r"body_ctx\.onnx, node ctx"):
        Bundle.open(tmp_path / "out")


def test_scratch_is_beside_the_bundle_and_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyError), scratch(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        (folder / "inner").mkdir()
        raise KeyError
    assert names(tmp_path) == []


def test_scratch_of_a_dead_process_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # beyond the largest process number
    with scratch(tmp_path / "out") as folder:
        left = folder.with_name(folder.name[:-8] + "00000000")
        left.mkdir()
    monkeypatch.undo()
    with scratch(tmp_path / "out"):
        assert not left.exists()
