"""What a host does from step to step: in which precision a step runs, and whether it runs at all.

Data and their text form; formulas and reasons are in docs/schedule.md, and runtime/steps.py carries them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from vdq_export.errors import ScheduleError, UnknownNameError
from vdq_export.plan import Precision
from vdq_export.settings import explain

Pattern = Literal["stp", "itp", "abs", "sba"]
BOTH: tuple[Precision, ...] = ("low", "high")


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class StaticPolicy(_Data, frozen=True, tag_field="kind", tag="static"):
    """The bin of a call depends on its timestep and branch alone. `precision`: of a bundle that has two."""

    precision: Precision = ""

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What steps may run in."""
        return (self.precision,)


class DeltaPolicy(_Data, frozen=True, tag_field="kind", tag="delta"):
    """δ-GBS: low until the accumulated relative change of the output reaches `delta`, then one high step.

    start, end: "high" makes a clip's first or last step high whatever has changed; "low", the definition, leaves them
    to delta. steps: of a clip, to know the last one; 0 means as many as were calibrated.
    """

    delta: Annotated[float, Meta(ge=0.0)]
    start: Literal["low", "high"] = "low"
    end: Literal["low", "high"] = "low"
    steps: Annotated[int, Meta(ge=0)] = 0

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return BOTH


class PatternPolicy(_Data, frozen=True, tag_field="kind", tag="pattern"):
    """A fixed order of low and high steps; of a clip's N steps, round(share · N) are high.

    stp: the last ones. itp: the first ones. abs: evenly spread, low first. sba: drawn with `seed`, alike in all clips.
    steps: N; 0 means as many as were calibrated.
    """

    pattern: Pattern
    share: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5
    seed: Annotated[int, Meta(ge=0)] = 0
    steps: Annotated[int, Meta(ge=0)] = 0

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return BOTH


Policy = StaticPolicy | DeltaPolicy | PatternPolicy


class Probe(_Data, frozen=True):
    """`graph`: the bundle path of the graph that gives the modulated input of `expert` ("": the only network).

    coefficients: of the polynomial that makes its relative change one of the output, highest power first; (): x itself.
    """

    graph: str
    expert: str = ""
    coefficients: tuple[float, ...] = ()


class CachePolicy(_Data, frozen=True, tag_field="kind", tag="cache"):
    """A step takes the last one's output until the accumulated, estimated change reaches `threshold` (0: never).

    steps: of a clip, to know the last one, which always runs; 0 means as many as were calibrated.
    """

    threshold: Annotated[float, Meta(ge=0.0)]
    probes: tuple[Probe, ...] = ()
    steps: Annotated[int, Meta(ge=0)] = 0

    def probe(self, expert: str) -> Probe:
        """The probe of one expert. Raises ScheduleError when there is none."""
        for one in self.probes:
            if one.expert in (expert, ""):
                return one
        raise ScheduleError(
            f"the bundle has no probe graph for expert {expert!r}" if self.probes else "the bundle has no probe graph",
            hint="export it with `schedule.cache` in the recipe to reuse steps",
        )


class Choice(NamedTuple):
    """What a text asks for; None leaves what the bundle says."""

    policy: Policy | None
    cache: CachePolicy | None


def parse(text: str) -> Choice:
    """Read "delta=0.3", "pattern=sba,share=0.35,seed=1", "static:low", "cache=0.1", or one of them "+" a cache.

    Raises UnknownNameError for a word nobody knows, with the nearest ones, and ScheduleError for all else.
    """
    policy: Policy | None = None
    cache: CachePolicy | None = None
    for part in re.split(r"\+(?=\s*[a-zA-Z]|$)", text):  # the + of 1e+3 joins nothing
        made = _part(part.strip(), text)
        if isinstance(made, CachePolicy):
            if cache is not None:
                raise ScheduleError(f"policy {text!r} says cache twice")
            cache = made
        else:
            if policy is not None:
                raise ScheduleError(
                    f"policy {text!r} chooses precisions twice", hint="only a cache can be added with +"
                )
            policy = made
    return Choice(policy, cache)


class _Form(NamedTuple):
    kind: type[Policy] | type[CachePolicy]
    value: str  # the field that "kind=…" sets
    needed: bool  # whether "kind" alone is incomplete
    settings: tuple[str, ...]


_FORMS: dict[str, _Form] = {
    "static": _Form(StaticPolicy, "precision", False, ()),
    "delta": _Form(DeltaPolicy, "delta", True, ("start", "end", "steps")),
    "pattern": _Form(PatternPolicy, "pattern", True, ("share", "seed", "steps")),
    "cache": _Form(CachePolicy, "threshold", True, ("steps",)),
}
_WORDS: dict[str, tuple[str, ...]] = {"precision": BOTH, "start": BOTH, "end": BOTH, "pattern": get_args(Pattern)}
_NUMBERS: dict[str, Callable[[str], float]] = {
    "delta": float, "threshold": float, "share": float, "seed": int, "steps": int,
}  # fmt: skip


def _part(part: str, text: str) -> Policy | CachePolicy:
    head, *rest = part.split(",")
    name, _, value = head.replace(":", "=", 1).partition("=")
    if name not in _FORMS:
        raise UnknownNameError("policy", name, _FORMS) if name else ScheduleError(f"policy {text!r} has an empty part")
    form = _FORMS[name]
    if form.needed and not value:
        raise ScheduleError(f"policy {name!r} needs a value", hint=f"write {name}={_example(form.value)}")
    given = {form.value: _value(form.value, value)} if value else {}
    for setting in rest:
        key, _, value = setting.partition("=")
        if key not in form.settings:
            raise _foreign(name, key, form.settings)
        given[key] = _value(key, value)
    return _made(form.kind, given, part)


def _made(kind: type[Policy] | type[CachePolicy], given: Mapping[str, Any], part: str) -> Policy | CachePolicy:
    try:
        # Through convert, so that the bounds of the types hold for texts as they do for files.
        made: Policy | CachePolicy = msgspec.convert({"kind": kind.__struct_config__.tag, **given}, kind)
    except msgspec.ValidationError as error:
        raise ScheduleError(f"policy {part!r}: {explain(error, kind)[0]}") from error
    return made


def _value(key: str, text: str) -> str | float:
    if key in _WORDS:
        if text not in _WORDS[key]:
            raise UnknownNameError(key, text, _WORDS[key])
        return text
    try:
        number = _NUMBERS[key](text)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise ScheduleError(f"{key} must be a number, got {text!r}", hint=f"for example {key}={_example(key)}")
    return number


def _foreign(name: str, key: str, known: tuple[str, ...]) -> ScheduleError | UnknownNameError:
    if not known:
        return ScheduleError(f"policy {name!r} has no settings, got {key!r}")
    return UnknownNameError(f"setting of policy {name}", key, known)


def _example(key: str) -> str:
    return "abs" if key == "pattern" else "20" if key in ("seed", "steps") else "0.3"
