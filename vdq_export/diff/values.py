"""What changed between two constants, or two settings, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from vdq_export.graphs.view import Param

SMALL = 16  # elements shown one by one
READABLE = 1 << 22  # elements up to which two tensors are read to say how far apart they are
_ROLES = {("QuantizeLinear", 1): "scale", ("QuantizeLinear", 2): "zero_point"}
_ROLES |= {("DequantizeLinear", 1): "scale", ("DequantizeLinear", 2): "zero_point", ("DequantizeLinear", 0): "integers"}


def role(op_type: str, slot: int, param: Param) -> str:
    """What a parameter is called where it is read: scale, zero_point, or its own name."""
    return _ROLES.get((op_type, slot), param.name)


def describe(param: Param, digits: int = 6) -> str:
    """Type, and the values (to that many significant digits) when they are few."""
    if param.elements > SMALL:
        return str(param.type)
    return f"{param.type} {_values(param.array(), digits)}"


def difference(old: Param, new: Param) -> str:
    """Text of old -> new. Both have one dtype and shape; values are read when that is cheap."""
    if old.elements > READABLE:
        return f"{old.type} sha256 {old.digest[:8]} -> {new.digest[:8]}"
    before, after = old.array(), new.array()
    if old.elements <= SMALL:
        return f"{_values(before)} -> {_values(after)}{_relative(before, after)}"
    changed = f"{old.type} sha256 {old.digest[:8]} -> {new.digest[:8]}"
    if before.dtype.kind not in "biufV":  # text; V holds the small floats and integers that numpy borrows
        return changed
    differ = before != after
    gap = np.abs(before.astype(np.float64) - after.astype(np.float64))
    count = f"{np.count_nonzero(differ)} of {differ.size} values differ"
    return f"{changed}, {count}, by at most {np.nanmax(gap):.4g}" if np.isfinite(gap).any() else f"{changed}, {count}"


def settings(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Differences of two JSON-like values as (dotted path, text). Objects in lists pair by `name`, else by place."""
    if isinstance(old, dict) and isinstance(new, dict):
        yield from _keyed(old, new, f"{path}." if path else "")
    elif _named(old) and _named(new):
        yield from _keyed({x["name"]: x for x in old}, {x["name"]: x for x in new}, f"{path}." if path else "")
    elif _numbers(old) and _numbers(new) and len(old) == len(new) and len(old) > SMALL:
        before, after = np.array(old, np.float64), np.array(new, np.float64)
        if count := np.count_nonzero(before != after):
            yield path, f"{count} of {len(old)} values differ, by at most {np.abs(before - after).max():.4g}"
    elif _numbers(old) and _numbers(new):
        if list(old) != list(new):
            yield path, f"{_short(old)} -> {_short(new)}"
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        numbered_old = {str(i): x for i, x in enumerate(old)}
        yield from _keyed(numbered_old, {str(i): x for i, x in enumerate(new)}, f"{path}." if path else "")
    elif old != new:
        gap = _relative(np.array(old), np.array(new)) if _numbers([old]) and _numbers([new]) else ""
        yield path, f"{_short(old)} -> {_short(new)}{gap}"


def _keyed(old: dict[str, Any], new: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key in [*old, *(k for k in new if k not in old)]:
        if key not in new:
            yield prefix + key, f"only in the first: {_short(old[key])}"
        elif key not in old:
            yield prefix + key, f"only in the second: {_short(new[key])}"
        else:
            yield from settings(old[key], new[key], prefix + key)


def _named(items: Any) -> bool:
    if not isinstance(items, list | tuple) or not items:
        return False
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    return None not in names and len(set(names)) == len(names)


def _numbers(items: Any) -> bool:
    if not isinstance(items, list | tuple):
        return False
    return all(isinstance(item, int | float) and not isinstance(item, bool) for item in items)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."


def _values(array: np.ndarray, digits: int = 6) -> str:
    if array.dtype.kind == "V" or "float" in array.dtype.name:
        array = array.astype(np.float64)
    items = [f"{x:.{digits}g}" if isinstance(x, float) else str(x) for x in array.ravel().tolist()]
    return items[0] if array.ndim == 0 else "[" + ", ".join(items) + "]"


def _relative(before: np.ndarray, after: np.ndarray) -> str:
    """How far a scalar moved; nothing for vectors, whose values are all shown."""
    if before.size != 1 or before.dtype.kind not in "iuf":
        return ""
    old, new = float(before.reshape(())), float(after.reshape(()))
    if old == 0.0 or before.dtype.kind != "f":
        return f" ({new - old:+.6g})"
    return f" ({(new - old) / abs(old):+.3%})"
