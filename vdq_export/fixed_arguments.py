"""Arguments that an export fixed: pipelines still pass them, and must pass what the graphs were made with.

The manifest describes each: numbers, strings and None as they are, lists of these as lists, tensors by shape and
projections onto fixed directions, so that tables of megabytes take a line and last bits do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_PROJECTIONS = 8
_TOLERANCE = 5e-3  # of a projection's expected size, the norm of the tensor; bfloat16 rounding is half of it


def describe(value: Any) -> Any:
    """`value` as JSON holds it: see the module. Raises TypeError for what is neither number, text, list nor tensor."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): describe(one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [describe(one) for one in value]
    if not hasattr(value, "shape"):
        raise TypeError(f"an argument of type {type(value).__name__} cannot be described")
    array = _to_numpy(value)
    return {"shape": list(array.shape), "projections": _projections(array)}


def same(value: Any, described: Any) -> bool:
    """Whether `value` is what describe() was given, to about two digits.

    A tensor may repeat its only sample, as pipelines repeat masks for both guidance branches.
    """
    if isinstance(described, Mapping) and described.keys() == {"shape", "projections"}:
        return hasattr(value, "shape") and _same_tensor(_to_numpy(value), described)
    if isinstance(described, Mapping):
        if not isinstance(value, Mapping) or value.keys() != described.keys():
            return False
        return all(same(value[name], one) for name, one in described.items())
    if isinstance(described, list):
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != len(described):
            return False
        return all(same(one, other) for one, other in zip(value, described, strict=True))
    if isinstance(described, float) and isinstance(value, int | float):
        return bool(np.isclose(value, described, rtol=1e-6, atol=0))
    return isinstance(value, bool | int | float | str | None) and bool(value == described)


def _same_tensor(array: Array, described: Mapping[str, Any]) -> bool:
    shape = tuple(described["shape"])
    if array.shape != shape:
        if array.shape[1:] != shape[1:] or shape[:1] != (1,) or not array.size or (array != array[:1]).any():
            return False
        array = array[:1]
    expected = np.array(described["projections"])
    scale = max(float(np.linalg.norm(array.astype(np.float64))), float(np.abs(expected).max(initial=0.0)), 1e-12)
    return bool((np.abs(np.array(_projections(array)) - expected) <= _TOLERANCE * scale).all())


def _projections(array: Array) -> list[float]:
    """Inner products with _PROJECTIONS rows of ±1, the same for every tensor of a size."""
    flat = np.nan_to_num(array.reshape(-1).astype(np.float64), posinf=1e30, neginf=-1e30)
    generator = np.random.default_rng(0)
    return [float(flat @ (2.0 * generator.integers(0, 2, flat.size) - 1.0)) for _ in range(_PROJECTIONS)]


def _to_numpy(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            value = value.float()
        value = value.numpy()
    return np.asarray(value)
