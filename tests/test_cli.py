"""The command as a person meets it: real processes, real exit codes, one clear line for what cannot be done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests import tiny_model
from tests.commands import MODEL, InProcess, assert_one_line, command
from vdq_export import bundle_writer, cli, compiler
from vdq_export.bundle import Bundle
from vdq_export.calib.record import CalibrationRecord
from vdq_export.graph import Graph
from vdq_export.model import Model


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], traced: Graph) -> InProcess:
    return InProcess(monkeypatch, capsys, traced)


# -- what it says about itself ---------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_names_everything(tmp_path: Path) -> None:
    code, out, err = command("--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= 30
    words = ("Usage: vdq-export ", "MODEL", "sample:NAME", "package.module:factory", "--target ort-int8 --tsw 4")
    assert [w for w in words if w not in out] == []
    assert [name for name in cli._COMMANDS if f"\n  {name} " not in out] == []
    assert command(cwd=tmp_path) == (0, out, "")


def test_every_command_explains_its_options(inside: InProcess) -> None:
    for name in cli._COMMANDS:
        code, out, err = inside(name, "--help")
        assert (code, err) == (0, "")
        assert f"Usage: vdq-export {name}" in out
    _, out, _ = inside("export", "--help")
    assert all(o in out for o in ("--target", "--tsw", "--recipe", "--out", "--force", "--calibration", "--json"))


@pytest.mark.parametrize("what", ["recipes", "targets"])
def test_catalogues_are_lists_of_objects_with_names(what: str, tmp_path: Path) -> None:
    code, out, err = command(what, "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    names = [one["name"] for one in json.loads(out)]
    assert {"recipes": "static-asq", "targets": "ort-int8"}[what] in names
    assert names == sorted(set(names))
    code, plain, _ = command(what, cwd=tmp_path)
    assert code == 0
    assert all(name in plain for name in names)


# -- refused at once: nothing is traced, nothing is written ----------------------------------------------------------

REFUSED_AT_ONCE = {
    "target": (["--target", "ort-int9"], ["unknown target 'ort-int9'", "ort-int8"]),
    "recipe": (["--recipe", "static-asg"], ["unknown recipe 'static-asg'", "static-asq"]),
    "recipe file": (["--recipe", "no/such.toml"], ["no/such.toml"]),
    "isa": (["--isa", "avx1024"], ["avx1024"]),
    "sample": (["sample:digit"], ["unknown sample 'digit'", "digits"]),
    "tsw 0": (["--tsw", "0"], ["--tsw 0"]),
    "tsw -3": (["--tsw=-3"], ["--tsw -3"]),
    "tsw word": (["--tsw", "many"], ["--tsw many", "auto"]),
    "calibration": (["--calibration", "nowhere.safetensors"], ["nowhere.safetensors"]),
    "pickle": (["weights.pt"], ["weights.pt", "pickled", "safetensors"]),
    "pickle folder": (["checkpoint"], ["model.bin", "pickled", "safetensors"]),
    "no such model": (["nonsense!"], ["nonsense!", "sample:NAME", "package.module:factory"]),
    "no module": (["no_such.module:build"], ["no_such"]),
    "no function": (["tests.tiny_model:nothing"], ["nothing"]),
    "no callable": (["tests.tiny_model:not_callable"], ["not_callable"]),
    "wrong type": (["tests.tiny_model:no_model"], ["str", "vdq_export.Model"]),
    "factory fails": (["tests.tiny_model:inputs"], ["tests.tiny_model:inputs", "TypeError"]),
    "NaN weight": (["tests.tiny_model:nan_weight"], ["blocks.1.ffn.net.2.weight", "NaN"]),
    "misspelt command": (["verfy", "bundle"], ["unknown command 'verfy'", "verify"]),
    "unknown option": (["--frobnicate"], ["--frobnicate", "--help"]),
    "dump": (["--dump-after", "qdqq"], ["unknown pass 'qdqq'", "qdq"]),
}


@pytest.mark.parametrize("case", REFUSED_AT_ONCE)
def test_refused_at_once(case: str, inside: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tracing(*_: Any, **__: Any) -> Graph:
        raise AssertionError("traced before it was refused")

    monkeypatch.setattr(compiler, "trace", no_tracing)
    monkeypatch.chdir(tmp_path)
    _pickles(tmp_path)
    arguments, words = REFUSED_AT_ONCE[case]
    model = [] if not arguments[0].startswith("-") else [MODEL]
    assert_one_line(inside(*model, *arguments), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "weights.pt"]


@pytest.mark.parametrize("case", ["target", "tsw 0", "pickle", "NaN weight", "misspelt command", "unknown option"])
def test_refused_at_once_by_a_real_process(case: str, tmp_path: Path) -> None:
    _pickles(tmp_path)
    arguments, words = REFUSED_AT_ONCE[case]
    assert_one_line(command(*arguments, cwd=tmp_path), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "weights.pt"]


def _pickles(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"\x80\x04.")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "model.bin").write_bytes(b"\x80\x04.")


def test_an_output_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    """Without --force nothing is replaced; with it, only a bundle is."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("ten years of work", encoding="utf-8")
    assert_one_line(command(MODEL, "--out", "thesis", cwd=tmp_path), "thesis", "not a bundle and is never replaced")
    assert_one_line(command(MODEL, "--out", "thesis", "--force", cwd=tmp_path), "thesis", "not a bundle")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["thesis", "thesis/chapter.txt"]
    assert (tmp_path / "thesis" / "chapter.txt").read_text(encoding="utf-8") == "ten years of work"


# -- refused when it is found out: still one line, still nothing written ---------------------------------------------


@pytest.fixture
def files(tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, current, beside which lie the record and damaged copies of it."""
    stock = tmp_path / "stock"
    stock.mkdir()
    whole = (made / "record.safetensors").read_bytes()
    (stock / "whole.safetensors").write_bytes(whole)
    (stock / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (stock / "head.safetensors").write_bytes(whole[:5])
    (stock / "text.safetensors").write_text("not a record\n" * 99, encoding="utf-8")
    save_file({"a": np.zeros(3, np.float32)}, stock / "foreign.safetensors")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize("damaged", ["short", "head", "text", "foreign"])
def test_damaged_calibration(damaged: str, inside: InProcess, files: Path) -> None:
    record = f"../stock/{damaged}.safetensors"
    assert_one_line(inside(MODEL, "--calibration", record), f"{damaged}.safetensors")
    assert list(files.iterdir()) == []


def test_calibration_of_another_model(inside: InProcess, files: Path, tiny: Model) -> None:
    """Same architecture, other weights: every name and shape fits, the hash does not."""
    other = inside.graph.copy()
    weight = other.values()["proj_out.weight"]
    weight.values = np.asarray(weight.values) * np.float32(0.9)
    inside.graph = other
    assert_one_line(inside(MODEL, "--calibration", "../stock/whole.safetensors"), "whole.safetensors", "another")
    assert list(files.iterdir()) == []


def test_more_bins_than_steps(inside: InProcess, files: Path) -> None:
    steps = len(tiny_model.TIMESTEPS)
    record = ("--calibration", "../stock/whole.safetensors")
    assert_one_line(inside(MODEL, *record, "--tsw", "999"), "--tsw 999", f"{steps} calibrated steps")
    assert_one_line(inside(MODEL, *record, "--tsw", str(steps + 1)), f"--tsw {steps + 1}")
    assert list(files.iterdir()) == []


def test_a_step_that_is_not_finite_names_layer_and_timestep(inside: InProcess, files: Path) -> None:
    result = inside("tests.tiny_model:nan_step")
    assert_one_line(result, "NaN or Inf", "timestep 550", "blocks.0")
    assert list(files.iterdir()) == []


def test_calibration_holding_nan_names_the_value(inside: InProcess, files: Path, traced: Graph) -> None:
    path = files.parent / "stock" / "whole.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("#hi") and "ffn" in n)
    tensors[name][0, 1] = np.nan
    save_file(tensors, path, metadata)
    assert_one_line(inside(MODEL, "--calibration", path), "NaN", name.removesuffix("#hi"))


@pytest.mark.parametrize("moment", ["weights", "graph", "manifest", "rename"])
def test_full_disk(moment: str, inside: InProcess, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = bundle_writer.BundleWriter.add_file

    def add_file(self: bundle_writer.BundleWriter, path: str, data: bytes) -> None:
        if path.endswith({"graph": ".onnx", "manifest": "manifest.json"}[moment]):
            monkeypatch.setattr(os, "fsync", full)
        real(self, path, data)

    if moment == "weights":
        monkeypatch.setattr(bundle_writer.WeightStore, "close", full)
    elif moment == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(bundle_writer.BundleWriter, "add_file", add_file)
    result = inside(MODEL, "--calibration", "../stock/whole.safetensors", "--out", "b")
    assert_one_line(result, "cannot write", "No space left on device")
    assert list(files.iterdir()) == []


def test_full_disk_keeps_the_bundle_that_was_there(
    inside: InProcess, files: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "bundle", files / "b")
    before = {p: p.read_bytes() for p in (files / "b").rglob("*") if p.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = inside(MODEL, "--calibration", "../stock/whole.safetensors", "--out", "b", "--force")
    assert_one_line(result, "cannot write")
    assert {p: p.read_bytes() for p in files.rglob("*") if p.is_file()} == before


# -- the export itself -----------------------------------------------------------------------------------------------


def test_export_says_what_it_made(made: Path) -> None:
    facts = json.loads((made / "export.json").read_text(encoding="utf-8"))
    bundle = Bundle.open(made / "bundle")
    assert facts["bytes"] == bundle.size
    assert facts["target"] == "ort-int8"
    assert len(facts["bins"]) == len(bundle.schedule.bins) == 2
    assert facts["layers"]["quantized"] >= 20
    assert facts["layers"]["float_in_bins"] == 0
    modes = {place.stat().st_mode for place in bundle.path.rglob("*") if place.is_file()}
    assert len(modes) == 1, "who serves a bundle reads all of it"
    assert sorted(p.name for p in made.iterdir()) == ["bundle", "export.json", "record.safetensors"]


def test_saved_calibration_gives_the_same_bundle(made: Path, inside: InProcess, files: Path) -> None:
    """Byte for byte but for the record of when and with what it was made; and any other --tsw needs no model."""
    code, _, err = inside(MODEL, "--tsw", "2", "--calibration", "../stock/whole.safetensors", "--out", "again")
    assert (code, err) == (0, "")
    for path in sorted(p.relative_to(files / "again") for p in (files / "again").rglob("*") if p.is_file()):
        if path.name != "manifest.json":
            assert (files / "again" / path).read_bytes() == (made / "bundle" / path).read_bytes(), path
    code, _, _ = inside(MODEL, "--tsw", "all", "--calibration", "../stock/whole.safetensors", "--out", "all")
    assert code == 0
    assert len(Bundle.open(files / "all").schedule.bins) == len(tiny_model.TIMESTEPS)


def test_record_of_the_command_is_that_of_the_library(made: Path) -> None:
    import hashlib

    recorded = CalibrationRecord.load(made / "record.safetensors")
    assert recorded.calls == 2 * 2 * len(tiny_model.TIMESTEPS)
    plan = Bundle.open(made / "bundle").plan
    assert plan is not None and plan.graph_hash == recorded.graph_hash
    assert len(bytes.fromhex(plan.graph_hash)) == hashlib.sha256().digest_size


def test_verify_exits_0_on_a_good_bundle_and_1_on_a_strict_recipe(made: Path, tmp_path: Path) -> None:
    code, out, err = command("verify", made / "bundle", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, report["verdict"], report["failures"], err) == (0, "pass", [], "")
    assert report["integer_kernels"]["planned"] == report["integer_kernels"]["executed"] > 0
    (tmp_path / "strict.toml").write_text(
        'name = "strict"\nsummary = "unreachable"\nextends = "static-asq"\n[verify]\nmin_layer_sqnr_db = 150.0\n',
        encoding="utf-8",
    )
    record = made / "record.safetensors"
    code, _, err = command(MODEL, "--tsw", "2", "--recipe", "strict.toml", "--calibration", record, cwd=tmp_path)
    assert code == 0, err
    code, out, err = command("verify", "bundle", "--json", cwd=tmp_path)
    report = json.loads(out)
    assert (code, report["verdict"], err) == (1, "fail", "")
    assert "bin00" in report["failures"][0]
    assert "blocks." in "".join(report["failures"])


def test_verify_refuses_another_model_and_a_folder_that_is_no_bundle(made: Path, tmp_path: Path) -> None:
    other = command("verify", made / "bundle", "--model", "tests.tiny_model:other", cwd=tmp_path)
    assert_one_line(other, "tests.tiny_model:other", "other weights")
    assert_one_line(command("verify", "nowhere", cwd=tmp_path), "nowhere", "not a bundle")


def test_tampered_bundle_is_refused(made: Path, tmp_path: Path, inside: InProcess) -> None:
    shutil.copytree(made / "bundle", tmp_path / "b")
    weights = tmp_path / "b" / "graphs" / "weights" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert_one_line(inside("verify", tmp_path / "b"), "weights.bin", "changed")
    weights.write_bytes(data[:-7])
    assert_one_line(inside("run", tmp_path / "b"), "weights.bin", "truncated")
