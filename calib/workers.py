"""Processes that solve tasks side by side: results in order, and the same whatever their number.

Each process is a Python of its own that reads pickles from a pipe. It is not forked, because this one has threads
(torch, onnxruntime), and not multiprocessing's `spawn`, which runs the caller's script again and so breaks scripts
without a main guard. It computes with one BLAS thread: how BLAS splits a product among threads changes the last bits.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any, TypeVar

from vdq_export.errors import CalibrationError

T = TypeVar("T")
R = TypeVar("R")
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "BLIS_NUM_THREADS"), "1"
)


_GONE = (EOFError, pickle.UnpicklingError)  # what a process reads whose asker has ended, perhaps in mid-question


def in_order(
    solve: Callable[..., R],
    tasks: Iterable[T],
    workers: int,
    *,
    name: Callable[[T], str],
    is_light: Callable[[T], bool] = lambda task: False,
    shared: Any = None,
) -> Iterator[R]:
    """solve(task) of every task, or solve(shared, task) where something is shared, in order, by `workers` processes.

    They are started when the first heavy task comes and each is sent what is shared once.
    A light task is solved in this process, where sending it would cost more; that must depend on the task alone.
    `solve` must be importable by name. Tasks are drawn when a process is free for them, so that no more than
    `workers` are in memory. An error of a task is raised when its turn comes, after which nothing more is done;
    CalibrationError, with the name of the task, where its process ended without an answer.
    """
    pool = _Pool(solve, iter(tasks), name, is_light, shared)
    threads = [threading.Thread(target=pool.work, daemon=True) for _ in range(max(1, workers))]
    try:
        for thread in threads:
            thread.start()
        yield from pool.results()
    finally:
        pool.stop()
        for thread in threads:
            thread.join()


class _Pool:
    """What the threads share; each has a process of its own, which it feeds."""

    def __init__(
        self,
        solve: Callable[..., Any],
        tasks: Iterator[Any],
        name: Callable[[Any], str],
        is_light: Callable[[Any], bool],
        shared: Any,
    ) -> None:
        self._solve, self._tasks, self._name, self._is_light = solve, tasks, name, is_light
        self._before = () if shared is None else (shared,)  # the task, in its arguments
        self._drawing, self._here = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._drawn, self._exhausted, self._stopped = 0, False, False
        self._answers: dict[int, Any] = {}  # by number of the task: (True, result) or (False, error)
        self._processes: list[subprocess.Popen[bytes]] = []

    def results(self) -> Iterator[Any]:
        for number in count():
            with self._changed:
                while number not in self._answers:
                    if self._exhausted and number >= self._drawn:
                        return
                    self._changed.wait()
                good, answer = self._answers.pop(number)
            if not good:
                raise answer
            yield answer

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            for process in self._processes:
                process.kill()

    def work(self) -> None:
        """Body of a thread: draw, solve, note the answer, until there is nothing left or an error."""
        process: subprocess.Popen[bytes] | None = None
        try:
            while (drawn := self._draw()) is not None:
                number, task = drawn
                try:
                    if self._is_light(task):
                        with self._here:
                            answer = (True, self._solve(*self._before, task))
                    else:
                        process = process or self._start()
                        answer = self._ask(process, task)
                except Exception as error:
                    answer = (False, error)
                del drawn, task
                with self._changed:
                    self._answers[number] = answer
                    self._exhausted |= not answer[0]
                    self._changed.notify_all()
        finally:
            if process is not None:
                _end(process)

    def _draw(self) -> tuple[int, Any] | None:
        with self._drawing:
            if self._exhausted or self._stopped:
                return None
            number = self._drawn
            try:
                drawn: Any = (number, next(self._tasks))
            except StopIteration:
                drawn = None
            except Exception as error:
                drawn = None
                self._answers[number] = (False, error)
            with self._changed:
                self._drawn += drawn is not None
                self._exhausted |= drawn is None
                self._changed.notify_all()
            return drawn  # type: ignore[no-any-return]

    def _start(self) -> subprocess.Popen[bytes]:
        with self._changed:
            if self._stopped:
                raise CalibrationError("solving was interrupted")
            environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
            command = [sys.executable, "-P", "-m", __name__]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._processes.append(process)
        assert process.stdin is not None
        with suppress(OSError):  # of a process that ended at once; the first question will tell
            pickle.dump((self._solve, self._before), process.stdin, protocol=5)
        return process

    def _ask(self, process: subprocess.Popen[bytes], task: Any) -> tuple[bool, Any]:
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(task, process.stdin, protocol=5)
            process.stdin.flush()
            answer: tuple[bool, Any] = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise CalibrationError(
                f"the process that solved {self._name(task)} ended with {process.wait()}",
                hint="fewer workers need less memory",
            ) from error
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.close()  # what it takes for the end
    except OSError:
        process.kill()
    process.stdout.close()
    process.wait()


def serve() -> None:
    """Answer pickled tasks of stdin on stdout until stdin ends; what else is printed goes to stderr.

    Before them comes (solve, arguments before the task).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal's whole group; the one that asked decides
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        solve, before = pickle.load(questions)
    except _GONE:
        return
    while True:
        try:
            task = pickle.load(questions)
        except _GONE:
            return
        try:
            answer = (True, solve(*before, task))
        except Exception as error:
            error.add_note("in a worker process:\n" + traceback.format_exc())
            answer = (False, error)
        try:
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
        except BrokenPipeError:
            return
        del task, answer


if __name__ == "__main__":
    serve()
