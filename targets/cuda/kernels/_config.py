"""Tile sizes and the like, kept as data: targets/cuda/tuned/sm_90.json and its like, by the device's capability.

A table has, for each kernel, a list of rules; the first that fits decides, the last fits everything. `when` holds
inclusive ranges of m, n, k (null: open) and lists of accepted values of any other kind:

    {"when": {"m": [1, 64], "group": [32]}, "why": "...", "config": {"BLOCK_M": 64, ..., "num_warps": 4}}

What m, n, k mean: linear_* rows, outputs, inputs; normalize rows, columns of `down` (0: none), channels; attention
queries, keys, channels of a head; rope rows, heads, channels of a head.

Under tuning() a launch that hands in `run` has the distinct configurations of its kernel timed on the device, and
the best is remembered (_tuning.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import torch

from vdq_export.errors import UnknownNameError, VdqError

Config = dict[str, int]
Run = Callable[[Config], object]

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
SHARED = MappingProxyType({"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376})
_RANGES = ("m", "n", "k")
_assumed: ContextVar[str | None] = ContextVar("assumed architecture", default=None)


class ConfigError(VdqError):
    """A table of configurations is damaged, or has none for what was asked."""


def config(kernel: str, run: Run | None = None, *, m: int, n: int, k: int, **kind: object) -> Config:
    """The configuration of `kernel` for this shape on the current device, a copy.

    run: launches the kernel with a configuration; with it, tuning() finds a better one on the device.
    kind: whatever else the table's rules may ask about (group=64, v="fp8"). Raises ConfigError where the device has
    no such kernel.
    """
    from vdq_export.targets.cuda.kernels import _tuning

    name = arch()
    table(name)  # damaged data is told before anything is timed
    tuned = None
    if _assumed.get() is None:  # nothing was found, nor can be, on a device that is not here
        tuned = _tuning.tuned(kernel, run, shape={"m": m, "n": n, "k": k}, kind=kind, arch=name)
    return dict(rule(name, kernel, {"m": m, "n": n, "k": k}, kind)) if tuned is None else tuned


def rule(name: str, kernel: str, shape: Mapping[str, int], kind: Mapping[str, object]) -> Config:
    """What the table of architecture `name` says. Raises ConfigError where it has nothing."""
    why = unsupported(kernel, name)
    if why is not None:
        raise ConfigError(f"{kernel} does not run on {name}: {why}")
    for one in _rules(kernel, name):
        if _fits(one["when"], shape, kind):
            found: Config = one["config"]
            return found
    raise AssertionError("the last rule fits everything")  # held by _check_rules


def candidates(kernel: str, name: str, shape: Mapping[str, int], kind: Mapping[str, object]) -> list[Config]:
    """The configurations worth timing: the table's own first, then all others of the same kinds, each once."""
    found = [rule(name, kernel, shape, kind)]
    for one in _rules(kernel, name):
        kinds = {key: value for key, value in one["when"].items() if key not in _RANGES}
        if kinds == _kinds_of_choice(kernel, name, shape, kind) and one["config"] not in found:
            found.append(one["config"])
    return [dict(one) for one in found]


def unsupported(kernel: str, name: str) -> str | None:
    """Why a kernel is not for an architecture; None where it is."""
    reasons: Mapping[str, str] = table(name)["unsupported"]
    return reasons.get(kernel)


def arch() -> str:
    """The table for the current device: its own, or of the next older architecture; without a GPU sm_90."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return _of_device(torch.cuda.current_device()) if torch.cuda.is_available() else "sm_90"


def capability() -> tuple[int, int]:
    """(major, minor) of what kernels are chosen for; without a GPU Hopper's."""
    if _assumed.get() is None and torch.cuda.is_available():
        return torch.cuda.get_device_capability()
    number = int(arch().removeprefix("sm_"))
    return number // 10, number % 10


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Choose as on another architecture: for compiling ahead of time."""
    if name not in ARCHS:
        raise UnknownNameError("CUDA architecture", name, ARCHS)
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)


def nearest(major: int, minor: int) -> str:
    """The newest table that is not newer than a device. Raises ConfigError for devices before sm_80."""
    older = [name for name in ARCHS if int(name.removeprefix("sm_")) <= 10 * major + minor]
    if (major, minor) == (8, 6) or (major, minor) == (8, 7):
        return "sm_89"  # its shared memory, and no sm_80
    if not older:
        raise ConfigError(f"sm_{major}{minor} is older than sm_80", hint="run this bundle's CPU target instead")
    return older[-1]


@cache
def table(name: str) -> dict[str, Any]:
    """A checked table. Raises ConfigError saying what is wrong with it."""
    if name not in ARCHS:
        raise UnknownNameError("CUDA architecture", name, ARCHS)
    place = resources.files("vdq_export.targets.cuda").joinpath("tuned", f"{name}.json")
    try:
        return check(json.loads(place.read_text(encoding="utf-8")), f"{name}.json")
    except (OSError, ValueError) as error:
        raise ConfigError(f"tuned/{name}.json cannot be read: {error}") from error


def check(data: Any, origin: str) -> dict[str, Any]:
    """`data` when it is a table; raises ConfigError naming the rule that is not one."""
    parts = {"device": str, "note": str, "unsupported": dict, "kernels": dict}
    if not isinstance(data, dict) or {key: type(value) for key, value in data.items()} != parts:
        raise ConfigError(f"{origin}: not a table of configurations")
    for kernel, rules in data["kernels"].items():
        _check_rules(rules, f"{origin}, {kernel}")
    doubled = sorted(data["unsupported"].keys() & data["kernels"].keys())
    if doubled:
        raise ConfigError(f"{origin}: {doubled[0]} is said to be unsupported and has rules")
    return data


def check_config(one: Any, origin: str) -> Config:
    """`one` when it is a configuration: whole numbers, blocks and warps powers of two. Raises ConfigError."""
    if not isinstance(one, dict) or not {"num_warps", "num_stages"} <= one.keys():
        raise ConfigError(f"{origin}: a configuration has num_warps and num_stages")
    for key, value in one.items():
        power = key.startswith("BLOCK_") or key == "num_warps"
        whole = type(value) is int and value >= 0
        if not whole or (power and (value == 0 or value & (value - 1))) or one["num_warps"] > 32:
            raise ConfigError(f"{origin}: {key} cannot be {value!r}")
    return one


def _check_rules(rules: Any, origin: str) -> None:
    if not isinstance(rules, list) or not rules:
        raise ConfigError(f"{origin}: no rules")
    for number, one in enumerate(rules):
        here = f"{origin}, rule {number}"
        if not isinstance(one, dict) or one.keys() != {"when", "why", "config"} or not isinstance(one["why"], str):
            raise ConfigError(f"{here}: a rule has when, why, config")
        if not isinstance(one["when"], dict) or not all(_check_when(*item) for item in one["when"].items()):
            raise ConfigError(f"{here}: {one['when']!r} is no condition")
        if check_config(one["config"], here).keys() != rules[0]["config"].keys():
            raise ConfigError(f"{here}: not the parameters of the first rule")
    if rules[-1]["when"]:
        raise ConfigError(f"{origin}: the last rule does not fit everything")


def _check_when(key: str, value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    if key not in _RANGES:
        return all(type(one) in (int, str, bool) for one in value)
    return len(value) == 2 and type(value[0]) is int and (value[1] is None or type(value[1]) is int)


def _fits(when: Mapping[str, Any], shape: Mapping[str, int], kind: Mapping[str, object]) -> bool:
    for key, value in when.items():
        if key in _RANGES:
            if not (value[0] <= shape[key] and (value[1] is None or shape[key] <= value[1])):
                return False
        elif kind.get(key) not in value:
            return False
    return True


def _kinds_of_choice(
    kernel: str, name: str, shape: Mapping[str, int], kind: Mapping[str, object]
) -> dict[str, list[object]]:
    chosen = next(one for one in _rules(kernel, name) if _fits(one["when"], shape, kind))
    return {key: value for key, value in chosen["when"].items() if key not in _RANGES}


def _rules(kernel: str, name: str) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = table(name)["kernels"]
    if kernel not in found:
        raise UnknownNameError(f"kernel of {name}", kernel, found)
    return found[kernel]


@cache
def _of_device(index: int) -> str:
    return nearest(*torch.cuda.get_device_capability(index))
