"""Finds the best configuration of a kernel by running it: the fallback where no table has been measured.

Off until tuning() or VDQ_TUNE=1; never while a CUDA graph is captured, never on the CPU. Results are remembered in
memory and in a folder of the user (VDQ_CACHE, else the system's), a file for each question, written aside and renamed,
so that any number of processes may share it. What is damaged there is said and ignored; it is data, never code.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import statistics
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import torch

from vdq_export.targets.cuda.kernels._config import Config, ConfigError, Run, candidates, check_config, rule

RUNS = 7  # each timed alone; the median counts
_active: ContextVar[bool] = ContextVar("tuning", default=False)
_known: dict[str, Config | None] = {}


@contextmanager
def tuning(active: bool = True) -> Iterator[None]:
    """Within it, launches time their candidates and remember the best. For the run that warms up."""
    token = _active.set(active)
    try:
        yield
    finally:
        _active.reset(token)


def tuned(
    kernel: str, run: Run | None, *, shape: Mapping[str, int], kind: Mapping[str, object], arch: str
) -> Config | None:
    """What was found for this question, now or earlier; None where nothing was and nothing may be timed now."""
    if not torch.cuda.is_available():
        return None
    question = _question(kernel, shape, kind, arch)
    if question not in _known:
        _known[question] = _read(question, rule(arch, kernel, shape, kind).keys())
    if _known[question] is None and run is not None and _may_time():
        with tuning(False):  # what `run` launches does not ask again
            best = best_of(candidates(kernel, arch, shape, kind), run)
        if best is not None:
            _known[question] = best
            _write(question, best)
    found = _known[question]
    return None if found is None else dict(found)


def best_of(choices: list[Config], run: Run) -> Config | None:
    """The fastest of `choices` on the current device; None where none of them runs."""
    times = [(seconds, number) for number, one in enumerate(choices) if (seconds := _seconds(one, run)) is not None]
    return dict(choices[min(times)[1]]) if times else None


def folder() -> Path:
    """Where results lie: VDQ_CACHE, else vdq-export below the user's cache folder."""
    own = os.environ.get("VDQ_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(base) / "vdq-export"


def forget() -> None:
    """Drop what this process remembers; the folder stays."""
    _known.clear()


def _may_time() -> bool:
    wanted = _active.get() or os.environ.get("VDQ_TUNE") == "1"
    return wanted and not torch.cuda.is_current_stream_capturing()


def _seconds(one: Config, run: Run) -> float | None:
    try:
        run(one)  # compiles
        torch.cuda.synchronize()
    except Exception as error:
        # Triton's OutOfResources and PTXASError have no common base that all its versions share. What the device
        # itself reports (an illegal address) ends the context: nothing could be timed after it.
        if isinstance(error, torch.AcceleratorError):
            raise
        return None
    times = list[float]()
    for _ in range(RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(one)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _question(kernel: str, shape: Mapping[str, int], kind: Mapping[str, object], arch: str) -> str:
    import triton

    device = torch.cuda.get_device_name()
    kinds = {key: str(value) for key, value in kind.items()}
    asked = {"kernel": kernel, **shape, "kind": kinds, "arch": arch, "device": device, "triton": triton.__version__}
    return json.dumps(asked, sort_keys=True)


def _place(question: str) -> Path:
    return folder() / "tuned" / f"{hashlib.sha256(question.encode()).hexdigest()}.json"


def _read(question: str, parameters: Set[str]) -> Config | None:
    place = _place(question)
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("question") != json.loads(question):
            raise ConfigError("another question's answer")
        found = check_config(data.get("config"), place.name)
        if found.keys() != parameters:
            raise ConfigError("the kernel of another version")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ConfigError) as error:
        warnings.warn(f"{place} is ignored: {error}", stacklevel=2)
        return None


def _write(question: str, best: Config) -> None:
    place = _place(question)
    draft = place.with_name(f"{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({"question": json.loads(question), "config": best}) + "\n", encoding="utf-8")
        draft.replace(place)
    except OSError as error:  # a full or read-only home: found again next time
        warnings.warn(f"{place} is not written: {error.strerror or error}", stacklevel=2)
        with suppress(OSError):
            draft.unlink(missing_ok=True)
