"""A process whose Triton does not interpret, as that of the tests does; it is asked one JSON question after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class TritonProcess:
    """A context manager. module: a test module that answers with serve() when it is run with --serve."""

    def __init__(self, module: str, environment: Mapping[str, str] | None = None) -> None:
        self._command = [sys.executable, "-m", module, "--serve"]
        self._environment = {**os.environ, "TRITON_INTERPRET": "0", **(environment or {})}

    def __enter__(self) -> TritonProcess:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, cwd=ROOT, env=self._environment, stdin=pipe, stdout=pipe, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # closes its input, at which it ends

    def ask(self, *question: str) -> Any:
        """Raises RuntimeError with the words of whatever was raised there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with {self._process.wait()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]


def serve(answer: Callable[..., object]) -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what Triton prints is no answer
    for line in sys.stdin:
        try:
            told: dict[str, object] = {"answer": answer(*json.loads(line))}
        except Exception as error:  # told by whoever asked
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), file=answers, flush=True)
