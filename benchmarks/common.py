"""What all benchmarks share: facts of the machine, child processes that speak JSON, result tables.

Standard library only: peers import it in their own environment. Results go to benchmarks/results/NAME.md and NAME.json;
those of `--small` runs to build/benchmarks/small/, since they prove only that a benchmark runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "benchmarks"
RESULTS = ROOT / "benchmarks" / "results"
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
PACKAGES = (
    *("vdq-export", "torch", "diffusers", "onnx", "onnxruntime", "onnxruntime-qnn", "numpy", "nncf", "openvino"),
    "nvidia-modelopt",
)

Task = Callable[[dict[str, Any]], dict[str, Any]]
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, column heads, rows


def machine() -> dict[str, Any]:
    """CPU model, the instruction sets that decide int8 speed, cores, memory in GiB, system."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"cpu family\s*:\s*(\d+)", text)
    flags = re.search(r"(?:flags|Features)\s*:\s*(.+)", text)
    has = set(flags[1].split()) if flags else set()
    name = model[1] if model else platform.processor() or platform.machine()
    return {
        "cpu": f"{name} (family {family[1]})" if family else name,
        "isa": [flag for flag in FLAGS if flag in has],
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions() -> dict[str, str]:
    """Installed versions of PACKAGES in this environment."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--small", action="store_true", help="tiny shapes: does it run at all? Results go to build/")
    made.add_argument("--threads", type=int, default=2, help="threads of every contestant (default 2)")
    made.add_argument("--task", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    return made


def main(made: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], tasks: Mapping[str, Task]) -> None:
    """Run a benchmark, or one of its `tasks` when this process is the child that `in_child` started."""
    arguments = made.parse_args()
    if arguments.task is None:
        run(arguments)
        return
    answer = private_stdout()
    name, settings = arguments.task
    answer(tasks[name](json.loads(settings)))


def private_stdout() -> Callable[[Any], None]:
    """A function that prints one JSON line to the real stdout; what anybody else prints goes to stderr from now on."""
    real = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lambda value: print(json.dumps(value), file=real, flush=True)


def in_child(module: str, task: str, settings: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """The answer of `task` of benchmarks.`module`, run in a fresh process of this Python."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--task", task, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, env=limited(threads), stdout=subprocess.PIPE, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Child:
    """A process of module benchmarks.`module` that answers JSON lines; `python` may belong to another environment."""

    def __init__(self, module: str, settings: Mapping[str, Any], threads: int, python: str = sys.executable) -> None:
        command = [python, "-m", f"benchmarks.{module}", json.dumps(settings)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=limited(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.hello = self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a benchmark process ended with {self._process.wait()}: {shlex.join(self._process.args)}")  # type: ignore[arg-type]
        answer: dict[str, Any] = json.loads(line)
        return answer


def limited(threads: int) -> dict[str, str]:
    """This environment with the thread pools of torch, BLAS and OpenMP limited."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error); the error of a single value is NaN."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def plus_minus(values: Sequence[float], digits: int) -> str:
    mean, error = mean_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def write(
    name: str,
    title: str,
    tables: Sequence[Table],
    data: Mapping[str, Any],
    notes: str,
    *,
    small: bool,
    module: str = "",
) -> None:
    """Write the result files of benchmark `name` and print the tables. `data`: every number, unrounded.

    module: of benchmarks, that made them, where it is not called `name`.
    """
    folder = WORK / "small" if small else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", f"benchmarks.{module or name}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {**versions(), **data.get("peer_versions", {})},
    }
    (folder / f"{name}.json").write_text(json.dumps({**facts, **data}, indent=1) + "\n")
    body = "\n".join(markdown(*table) for table in tables)
    text = f"# {title}\n\n{body}\n{notes.strip()}\n\n{_footer(facts)}"
    (folder / f"{name}.md").write_text(text)
    print(text)


def markdown(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] + ["--:"] * (len(heads) - 1), *[list(row) for row in rows]]
    return (f"## {title}\n\n" if title else "") + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _footer(facts: Mapping[str, Any]) -> str:
    host = facts["machine"]
    return (
        f"Measured {facts['date']} by `{facts['command']}` on {host['cpu']} ({', '.join(host['isa'])}), "
        f"{host['cores']} cores, {host['memory_gib']} GiB, {host['system']}; "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + ".\n"
    )
