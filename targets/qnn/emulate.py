"""One run of a graph in the HTP emulator, in a process of its own: what crashes or hangs there ends only that process.

python -m vdq_export.targets.qnn.emulate GRAPH.onnx FEEDS.npz RESULT.npz v75
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vdq_export.errors import CompileError
from vdq_export.graph import Array, Graph

LIMIT_SECONDS = 900.0
_REFUSED, _NO_RESULT = 3, 4  # exit codes of the process: it did not compile; it did and its run failed


class EmulatorError(CompileError):
    """The compiled graph gave no result: the emulator crashed, or took longer than its limit."""


@dataclass(frozen=True)
class Emulation:
    """outputs by name, and the seconds it took to compile and to run."""

    outputs: dict[str, Array]
    compile_seconds: float
    run_seconds: float


def emulate(
    graph: Graph, feeds: Mapping[str, Array] | None, arch: str = "v75", *, limit_seconds: float = LIMIT_SECONDS
) -> Emulation:
    """Compile `graph` for `arch` with every node on the HTP and run it once; without feeds only compile it.

    Raises CompileError with the compiler's own message, EmulatorError when there is no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("graph.onnx", "feeds.npz", "result.npz")]
        graph.save(paths[0])
        if feeds is not None:  # by number: a value may have any name
            np.savez(paths[1], *[feeds[str(one.name)] for one in graph.gs.inputs])
        command = [sys.executable, "-m", __name__, *map(str, paths), arch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"the emulator gave no result within {limit_seconds:.0f} s") from error
        answer = _answer(done)
        outputs: dict[str, Array] = {}
        if feeds is not None:
            with np.load(paths[2]) as stored:
                outputs = {str(one.name): stored[f"arr_{index}"] for index, one in enumerate(graph.gs.outputs)}
    return Emulation(outputs, answer["compile"], answer["run"])


def _answer(done: subprocess.CompletedProcess[str]) -> dict[str, float]:
    """The seconds that a process printed. Raises CompileError or EmulatorError for what it says or died of."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    said = json.loads(lines[-1]) if lines else {}
    if done.returncode < 0:
        raise EmulatorError(f"the compiler or emulator crashed: {signal.strsignal(-done.returncode)}")
    if done.returncode == _REFUSED:
        raise CompileError(said["error"])
    if done.returncode == _NO_RESULT:
        raise EmulatorError(said["error"])
    if done.returncode:
        raise RuntimeError(f"{__name__} failed:\n{done.stderr}")  # neither of the two: a mistake on our side
    times: dict[str, float] = said
    return times


def main(graph: str, feeds: str, result: str, arch: str) -> int:
    """The process: prints one JSON object, with the seconds or the error."""
    from vdq_export.targets.qnn import hexagon

    start = time.perf_counter()
    try:
        session = hexagon.emulator(Path(graph), arch)
    except CompileError as error:
        print(json.dumps({"error": str(error)}))
        return _REFUSED
    compiled = time.perf_counter()
    if Path(feeds).exists():
        with np.load(feeds) as stored:
            values = {one.name: stored[f"arr_{index}"] for index, one in enumerate(session.get_inputs())}
        try:
            outputs = session.run([one.name for one in session.get_outputs()], values)
        except Exception as error:  # onnxruntime's own errors have no common class
            print(json.dumps({"error": " ".join(str(error).split())}))
            return _NO_RESULT
        np.savez(result, *outputs)
    print(json.dumps({"compile": compiled - start, "run": time.perf_counter() - compiled}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
