"""One run of the offline compiler, in a process of its own: python -m vdq_export.targets.qnn.offline JOB RESULT

A process, because the backend prints past Python, keeps its memory, and takes its process with it when it fails; and
because graphs that share weights must be compiled by one process, one after the other.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from vdq_export.errors import CompileError, OffDeviceError, VdqError

KIB = 1024


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Compile the graph at `source` and write an ONNX model with its EPContext node at `context`, the binary beside."""

    source: str
    context: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks for one architecture. shared: all their graphs go into one binary, equal weights once."""

    arch: str
    soc_model: int
    tasks: tuple[Task, ...]
    shared: bool = False


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """What one task took, and how many nodes the HTP got: all of them, else the job fails."""

    seconds: float
    cpu_seconds: float
    nodes: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """error: the compiler's own words; then nothing else counts. off_device: they name nodes the HTP does not take."""

    tasks: tuple[Done, ...] = ()
    peak_memory_bytes: int = 0
    error: str = ""
    off_device: bool = False


def compile_offline(job: Job, folder: Path) -> Result:
    """Run `job` in a child process that keeps its notes in `folder`. Raises CompileError."""
    notes, answer = folder / "job.json", folder / "result.json"
    notes.write_bytes(msgspec.json.encode(job))
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, str(notes), str(answer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = "probably too little memory: try --parts" if name == "SIGKILL" else None
        raise CompileError(f"the compiler for {job.arch} was ended by {name}", hint=hint)
    if not answer.is_file():
        last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        raise CompileError(f"the compiler for {job.arch} ended with code {done.returncode}: {last}")
    result = msgspec.json.decode(answer.read_bytes(), type=Result)
    if result.error:
        raise (OffDeviceError if result.off_device else CompileError)(result.error)
    return result


def run(job: Job) -> Result:
    """Compile every task in this process. Raises OffDeviceError naming nodes that the HTP does not take."""
    import resource  # not on Windows, where this process is never started but `compile --help` has to work

    from vdq_export.targets.qnn import hexagon

    options = {**hexagon.provider_options(job.arch), "soc_model": str(job.soc_model)}
    # One spill buffer for all graphs of a context; its size is then written into the EPContext nodes.
    options |= {"enable_htp_spill_fill_buffer": "1", "enable_htp_prepare_only": "1"}
    if job.shared:
        options["enable_htp_weight_sharing"] = "1"
    done, kept = [], []
    for number, task in enumerate(job.tasks):
        entries = {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": task.context}
        if job.shared:
            entries["ep.share_ep_contexts"] = "1"
            entries["ep.stop_share_ep_contexts"] = str(int(number == len(job.tasks) - 1))
        start, cpu = time.perf_counter(), time.process_time()
        session = hexagon.strict_session(Path(task.source), options, entries)
        nodes = sum(map(len, hexagon.assignment(session).values()))
        took = time.perf_counter() - start
        done.append(Done(seconds=took, cpu_seconds=time.process_time() - cpu, nodes=nodes))
        kept.append(session if job.shared else None)  # the binary they share is written by the last one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return Result(tasks=tuple(done), peak_memory_bytes=peak)


def main(notes: str, answer: str) -> None:
    """The process: the result, or the error, as JSON."""
    with suppress(OSError):  # out of memory, the kernel should take this process and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    job = msgspec.json.decode(Path(notes).read_bytes(), type=Job)
    try:
        result = run(job)
    except VdqError as error:
        result = Result(error=str(error), off_device=isinstance(error, OffDeviceError))
    draft = Path(f"{answer}.draft")
    draft.write_bytes(msgspec.json.encode(result))
    draft.replace(answer)
    sys.stdout.flush()
    os._exit(0)  # the backend's own clean-up takes seconds and may crash; everything is on disk


if __name__ == "__main__":
    main(*sys.argv[1:])
