"""What can go wrong, said so that the reader knows what, where and what to do.

Exit codes of the command: 0 done; 1 the answer is "no" (verify failed, graphs differ, a strict run skipped an edit);
2 the job could not be done (every VdqError).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VdqError(Exception):
    """A job that cannot be done. `what` is one line; `hint` says what to do about it."""

    exit_code = 2

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what if hint is None else f"{what}; {hint}")
        self.what = what
        self.hint = hint


class UnknownNameError(VdqError):
    """A target, recipe, sample … that does not exist; carries the nearest names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}", hint=nearest(name, known))


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say to somebody who wrote `name`, which is none of `known`."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"


class ModelError(VdqError):
    """The model, its weights, its inputs or its trajectories cannot be used."""


class TraceError(VdqError):
    """The model could not be turned into a static ONNX graph equal to it."""


class RecipeError(VdqError):
    """A recipe asks for something that does not exist or contradicts itself or the target."""


class CalibrationError(VdqError):
    """The calibration record is missing, damaged, of another model, or holds NaN or Inf."""


class PlanError(VdqError):
    """A quantization plan is invalid or does not fit the graph it is applied to."""


class PassError(VdqError):
    """A graph pass met a graph that breaks its contract."""


class StrictError(PassError):
    """--strict: something was left undone that an export otherwise only tells. The answer is "no", not a failure."""

    exit_code = 1


class BundleError(VdqError):
    """A bundle is incomplete, altered, of another format, or cannot be written."""


class ScheduleError(VdqError):
    """No graph is scheduled for the timestep or branch asked for."""


class EngineError(VdqError):
    """There is no such engine for work, or it ended before the work did."""


class MissingToolError(VdqError):
    """A vendor's tool that a job needs is not installed or does not load here."""


class CompileError(VdqError):
    """A vendor's compiler refused a graph; carries the tool's own words."""


class OffDeviceError(CompileError):
    """Nodes of a graph that the device does not take, however the graph is cut."""
