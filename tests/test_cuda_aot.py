"""Kernels compiled ahead of time: Triton finds them and compiles nothing, passes over others, refuses damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from tests.cuda_aot import seal
from tests.triton_process import TritonProcess
from vdq_export.targets.cuda import aot
from vdq_export.targets.cuda.aot_launch import PACKAGE, AotError, Launch, preload, record
from vdq_export.targets.cuda.kernels._config import ConfigError
from vdq_export.work.store import WorkStore

Step = Callable[[str, Path], Any]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's Triton cache in the processes below."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def step(cache: Path) -> Iterator[Step]:
    """For steps that leave nothing in their process."""
    with TritonProcess("tests.cuda_aot", {"TRITON_CACHE_DIR": str(cache)}) as process:
        yield lambda name, folder: process.ask(name, str(folder))


@pytest.fixture
def fresh(cache: Path) -> Iterator[Step]:
    """A process of this test's own."""
    with TritonProcess("tests.cuda_aot", {"TRITON_CACHE_DIR": str(cache)}) as process:
        yield lambda name, folder: process.ask(name, str(folder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, step: Step) -> Path:
    folder = tmp_path_factory.mktemp("aot") / "bundle"
    told = step("make", folder)
    assert told["launches"] == 1 and "_rows:row_kernel for sm_90: " in told["said"][0]
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_triton_finds_the_kernel_and_compiles_nothing(bundle: Path, fresh: Step, cache: Path) -> None:
    told = fresh("run", bundle)
    assert told["taken"] == 1 and told["launched"] == [["row_kernel", True]]
    assert not list(cache.rglob("*.cubin")), "the user's cache is left alone"


def test_without_the_bundle_triton_compiles(bundle: Path, step: Step) -> None:
    assert step("run_bare", bundle) == {"error": "Triton compiles"}


def test_another_source(bundle: Path, fresh: Step) -> None:
    assert fresh("install_other_source", bundle)["taken"] == 0


def test_another_device(bundle: Path, step: Step) -> None:
    assert step("install_elsewhere", bundle)["taken"] == 0


def test_another_triton_compiles(bundle: Path, step: Step) -> None:
    _edit(bundle, lambda index: index.update(triton="3.1.0"))
    told = step("install", bundle)
    assert told["taken"] == 0 and "compiled with Triton 3.1.0" in told["said"][0]


def test_a_damaged_entry_is_refused(bundle: Path, step: Step) -> None:
    (cubin,) = bundle.rglob("*.cubin")
    data = bytearray(cubin.read_bytes())
    data[len(data) // 2] ^= 1
    cubin.write_bytes(data)
    assert f"{cubin.name} was changed: its sha256 is not the manifest's" in step("install", bundle)["error"]


def test_an_entry_that_the_manifest_does_not_list_is_refused(bundle: Path, step: Step) -> None:
    _edit(bundle, lambda index: index["entries"][0].update(key="../../other"))
    assert "is not a file of the bundle" in step("install", bundle)["error"]


def test_an_entry_under_another_key_is_never_taken(bundle: Path, step: Step) -> None:
    (folder,) = (bundle / "cuda/kernels/sm_90").iterdir()
    folder.rename(folder.with_name("A" * 52))
    _edit(bundle, lambda index: index["entries"][0].update(key="A" * 52))
    assert step("install", bundle)["taken"] == 0


@pytest.mark.parametrize("kernel", ["os:system", f"{PACKAGE}_rows:torch", f"{PACKAGE}nothing:row_kernel"])
def test_what_is_no_kernel_of_ours_is_never_taken(bundle: Path, step: Step, kernel: str) -> None:
    _edit(bundle, lambda index: index["entries"][0].update(kernel=kernel))
    assert step("install", bundle)["taken"] == 0


def test_a_damaged_index_is_told(bundle: Path, step: Step) -> None:
    _edit(bundle, lambda index: index["entries"][0].pop("key"))
    assert "index.json is damaged" in step("install", bundle)["error"]


def test_a_bundle_without_kernels(tmp_path: Path, step: Step) -> None:
    (tmp_path / "bundle").mkdir()
    seal(tmp_path / "bundle")
    assert step("install", tmp_path / "bundle") == {"taken": 0, "launched": [], "said": []}


def test_no_path_of_this_machine_is_in_the_bundle(made: Path) -> None:
    here = str(Path(aot.__file__).resolve().parents[2]).encode()
    assert not [place for place in made.rglob("*") if place.is_file() and here in place.read_bytes()]


def test_compiled_kernels_are_written_down_too(fresh: Step, tmp_path: Path) -> None:
    assert fresh("record_again", tmp_path) == [1, 1]


def test_meta_tensors_launch_what_real_ones_do(step: Step, tmp_path: Path) -> None:
    told = step("record_block", tmp_path)
    assert told == {"kernels": ["_rows", "attention_int8", "linear_int8", "rope"], "same": True}


def test_what_does_not_compile_is_said_and_left_out() -> None:
    said: list[str] = []
    launches = [Launch(f"{PACKAGE}_rows:nothing", "sm_90", "{}")]
    ((path, data),) = aot.compile_all(launches, jobs=1, say=said.append)
    assert path == aot.INDEX and json.loads(data)["entries"] == []
    assert "_rows:nothing for sm_90 is compiled where it runs: AotError" in said[0]


def test_a_compiler_that_dies_and_one_that_asks_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[dict[str, Any]] = iter([{"error": "the compiler ended with -11"}, {"shared": 10**6}])
    monkeypatch.setattr(aot, "_start", lambda: _Dead())
    monkeypatch.setattr(aot._Workers, "compile", lambda self, launch: next(answers))
    said: list[str] = []
    launches = [Launch(f"{PACKAGE}rope:_kernel", arch, "{}") for arch in ("sm_89", "sm_90")]
    assert [path for path, _ in aot.compile_all(launches, jobs=1, say=said.append)] == [aot.INDEX]
    assert "ended with -11" in said[0] and "1000000 bytes of shared memory of 232448" in said[1]


def test_what_was_compiled_before_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = {
        "key": "K",
        "name": "a.json",
        "shared": 0,
        "seconds": 1.0,
        "files": {"a.json": "e30=", "a.cubin": "AAAA"},
    }
    answers = iter([{"error": "the compiler ended with -9"}, compiled])
    monkeypatch.setattr(aot, "_start", lambda: _Dead())
    monkeypatch.setattr(aot._Workers, "compile", lambda self, launch: next(answers))
    launches = [Launch(f"{PACKAGE}rope:_kernel", "sm_90", "{}")]
    with WorkStore(tmp_path) as store:
        told = [[path for path, _ in aot.compile_all(launches, jobs=1, store=store)] for _ in range(3)]
    folder = f"{aot.FOLDER}/sm_90/K"
    assert told == [[aot.INDEX], *2 * [[f"{folder}/a.cubin", f"{folder}/a.json", aot.INDEX]]]


def test_an_architecture_without_a_kernel_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(program: object, arch: str) -> list[Launch]:
        if arch == "sm_80":
            raise ConfigError("no such kernel")
        return [Launch("a", arch, "{}")]

    monkeypatch.setattr(aot, "record", recorded)
    said: list[str] = []
    assert [one.arch for one in aot.record_all(print, ["sm_80", "sm_90"], said.append)] == ["sm_90"]
    assert said == ["no kernels for sm_80: no such kernel"]


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(AotError, match="unset TRITON_INTERPRET"):
        record(print, "sm_90")
    with pytest.raises(AotError, match="interprets kernels"):
        preload(Launch(f"{PACKAGE}_rows:row_kernel", "sm_90", "{}"))


class _Dead:
    def kill(self) -> None:
        """Nothing runs."""

    def communicate(self) -> None:
        """Nothing is said."""


def _edit(bundle: Path, change: Any) -> None:
    place = bundle / aot.INDEX
    index = json.loads(place.read_text())
    change(index)
    place.write_text(json.dumps(index))
    seal(bundle)
