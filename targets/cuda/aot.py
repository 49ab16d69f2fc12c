"""Kernels compiled ahead of time: a bundle carries them for sm_80 … sm_120, and a device starts without compiling.

    launches = launches_of("graphs/cuda.00.onnx")                # no GPU, nothing computed
    for path, data in compile_all(launches): writer.add_file(path, data)
    install(bundle)                                              # on the device, before the first launch

What is stored are entries of Triton's own cache: cubin and description under the key that Triton computes from the
kernel's source, what it was specialized for, its options, ptxas and Triton itself. install() has Triton look each of
them up (JITFunction.preload) in a cache that answers from the bundle alone and knows nothing else: where any of that
differs here, the key is another one, the entry is passed over, and that kernel is compiled at its first launch as ever.

Entries are code. They are read from a bundle only, each checked against the manifest's hash, they serve kernels of this
package only, in this process only: the user's own Triton cache, which other programs trust, is never written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
import triton
from triton import knobs
from triton.runtime.cache import CacheManager
from triton.runtime.driver import driver

from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError
from vdq_export.targets.cuda.aot_launch import AotError, Launch, preload, record
from vdq_export.targets.cuda.kernels._config import ARCHS, SHARED, ConfigError
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.program import FLOAT
from vdq_export.work import store as work_store
from vdq_export.work.store import WorkStore

FOLDER = "cuda/kernels"
INDEX = f"{FOLDER}/index.json"
_INSTALLING = threading.Lock()  # Triton has one cache for all threads
Say = Callable[[str], None]
MOST_JOBS = 16  # each process holds torch and Triton, some 500 MB


def record_all(program: Callable[[], object], archs: Sequence[str] = ARCHS, say: Say | None = None) -> list[Launch]:
    """The launches of `program` on each architecture; what cannot run on one is said and left out."""
    found: list[Launch] = []
    for arch in archs:
        try:
            found += record(program, arch)
        except ConfigError as error:
            _tell(say, f"no kernels for {arch}: {error}")
    return found


def launches_of(
    model: str | Path | onnx.ModelProto,
    *,
    folder: str | Path | None = None,
    dtype: torch.dtype = FLOAT,
    archs: Sequence[str] = ARCHS,
    say: Say | None = None,
) -> list[Launch]:
    """The launches of a fused graph, lowered to meta tensors; model, folder, dtype as lower() takes them."""
    program = lower(model, folder=folder, device="meta", dtype=dtype)
    feeds = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in program.inputs}
    return record_all(lambda: program(feeds), archs, say)


def compile_all(
    launches: Sequence[Launch], *, jobs: int | None = None, say: Say | None = None, store: WorkStore | None = None
) -> Iterator[tuple[str, bytes]]:
    """Files for a bundle, the index last. jobs: processes, at most one a core and MOST_JOBS. store: of finished work.

    A launch that does not compile, or needs more shared memory than its device has, is said and left out.
    """
    entries = []
    jobs = min(jobs or os.cpu_count() or 1, MOST_JOBS, len(launches))
    with _Workers(jobs) as workers, ThreadPoolExecutor(max(jobs, 1)) as threads:
        answers = threads.map(partial(_compiled, workers, store), launches)
        for launch, answer in zip(launches, answers, strict=True):
            problem = answer.get("error") or _too_large(launch, answer["shared"])
            if problem:
                _tell(say, f"{launch.name} for {launch.arch} is compiled where it runs: {problem}")
                continue
            files = {name: base64.b64decode(text) for name, text in answer["files"].items()}
            size = sum(map(len, files.values()))
            _tell(say, f"{launch.name} for {launch.arch}: {answer['seconds']:.1f} s, {size} bytes")
            for name, data in sorted(files.items()):
                yield f"{FOLDER}/{launch.arch}/{answer['key']}/{name}", data
            entries.append({**vars(launch), "key": answer["key"], "files": sorted(files)})
    index = {"format": 1, "triton": triton.__version__, "entries": entries}
    yield INDEX, json.dumps(index, indent=1, sort_keys=True).encode() + b"\n"


def install(bundle: Bundle, say: Say | None = None) -> int:
    """Give Triton the kernels of a bundle for the current device; returns how many it took.

    Raises BundleError for a file that is not the manifest's, before anything in it is used.
    """
    if bundle.manifest.file(INDEX) is None:
        return 0
    index = _index(_verified(bundle, INDEX))
    if index["triton"] != triton.__version__:
        _tell(say, f"kernels were compiled with Triton {index['triton']}; this is {triton.__version__}, which compiles")
        return 0
    arch = f"sm_{driver.active.get_current_target().arch}"
    taken = 0
    with _INSTALLING:
        for entry in index["entries"]:
            if entry["arch"] == arch:
                taken += _take(bundle, entry, say)
    _tell(say, f"{taken} kernels for {arch} from the bundle")
    return taken


def _compiled(workers: _Workers, store: WorkStore | None, launch: Launch) -> dict[str, Any]:
    key = "" if store is None else work_store.key("kernel", launch, triton.__version__)
    kept = None if store is None else store.get(key)
    if kept is not None:
        return {**work_store.decode(kept, dict), "seconds": 0.0}
    answer = workers.compile(launch)
    if store is not None and "error" not in answer:
        store.put(key, work_store.encode(answer))
    return answer


def _take(bundle: Bundle, entry: Mapping[str, Any], say: Say | None) -> bool:
    """Whether Triton took this entry; one that it cannot use is told, and that kernel compiled at its first launch."""
    place = f"{FOLDER}/{entry['arch']}/{entry['key']}"
    files = {name: _verified(bundle, f"{place}/{name}") for name in entry["files"]}
    with TemporaryDirectory() as folder, knobs.cache.scope():
        written = {name: Path(folder, Path(name).name) for name in files}
        for name, path in written.items():
            path.write_bytes(files[name])
        knobs.cache.manager_class = _one_entry(entry["key"], {name: str(path) for name, path in written.items()})
        try:
            preload(Launch(entry["kernel"], entry["arch"], entry["specialization"]))
        except (_OtherKeyError, AotError):
            return False
        except Exception as error:  # of Triton, which has classes of its own, or of an entry that is none
            _tell(say, f"{entry['kernel']}: {type(error).__name__}: {error}")
            return False
    return True


class _OtherKeyError(Exception):
    """Triton asked for an entry that the bundle does not have."""


def _one_entry(key: str, group: dict[str, str]) -> type[CacheManager]:
    """A cache that holds one entry, and ends the search for any other before Triton compiles.

    Triton has one cache for all threads: those of others get what was there.
    """
    usual, asking = knobs.cache.manager_class, threading.get_ident()

    class OneEntry(CacheManager):  # type: ignore[misc]  # Triton has no types
        def __new__(cls, asked: str, override: bool = False, dump: bool = False) -> Any:
            return super().__new__(cls) if threading.get_ident() == asking else usual(asked, override, dump)

        def __init__(self, asked: str, override: bool = False, dump: bool = False) -> None:
            if asked != key:
                raise _OtherKeyError(asked)

        def get_file(self, filename: str) -> str | None:
            return group.get(filename)

        def get_group(self, filename: str) -> dict[str, str]:
            if filename not in group:
                raise _OtherKeyError(filename)
            return dict(group)

        def put(self, data: object, filename: str, binary: bool = True) -> str:
            raise _OtherKeyError(filename)

        def put_group(self, filename: str, group: dict[str, str]) -> str:
            raise _OtherKeyError(filename)

    return OneEntry


def _verified(bundle: Bundle, path: str) -> bytes:
    """The bytes of a file as they are now, when they are those of the manifest."""
    entry = bundle.manifest.file(path)
    if entry is None:
        raise BundleError(f"{bundle.path}: {path} is not a file of the bundle")
    try:
        data = (bundle.path / path).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {bundle.path / path}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{bundle.path / path} was changed: its sha256 is not the manifest's", hint="export it again")
    return data


def _index(data: bytes) -> dict[str, Any]:
    try:
        index = json.loads(data)
        texts = [index["triton"], *(one[key] for one in index["entries"] for key in _TEXTS)]
        names = [name for one in index["entries"] for name in one["files"]]
        if index["format"] != 1 or not all(isinstance(text, str) for text in [*texts, *names]):
            raise ValueError("unknown format")
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{INDEX} is damaged: {error}") from error
    found: dict[str, Any] = index
    return found


_TEXTS = ("kernel", "arch", "specialization", "key")


def _too_large(launch: Launch, shared: int) -> str | None:
    limit = SHARED[launch.arch]
    return f"{shared} bytes of shared memory of {limit}" if shared > limit else None


def _tell(say: Say | None, text: str) -> None:
    if say is not None:
        say(text)


class _Workers:
    """Processes that compile; compile() may be called from as many threads as there are processes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()

    def __enter__(self) -> _Workers:
        for _ in range(self._count):
            self._free.put(_start())
        return self

    def __exit__(self, *error: object) -> None:
        for _ in range(self._count):
            process = self._free.get()
            process.kill()
            process.communicate()

    def compile(self, launch: Launch) -> dict[str, Any]:
        """What aot_worker answers; a process that dies is an error of this launch alone."""
        process = self._free.get()
        line = ""
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(vars(launch)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # told as its exit below
        if line:
            self._free.put(process)
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = process.wait()
        self._free.put(_start())
        return {"error": f"the compiler ended with {code}"}


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vdq_export.targets.cuda.aot_worker"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)
