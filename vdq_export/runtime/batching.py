"""Calls of any batch size on graphs of one static batch.

Legend: B samples of the call, G samples the graph takes. An input is *batched* when its first dimension is B in the
call and G in the graph; others (rotary tables, sizes) go to every run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vdq_export.errors import BundleError
from vdq_export.manifest import Signature, TensorInfo

Array = np.ndarray[Any, Any]
Run = Callable[[int, dict[str, Array]], Array]


def primary(signature: Signature) -> TensorInfo:
    """The input that decides batch, dtype and device of the result: the first that is not the timestep."""
    return next((one for one in signature.inputs if one.name != signature.timestep), signature.inputs[0])


def batch_of(signature: Signature, inputs: Mapping[str, Array]) -> int:
    """B. Raises BundleError for an empty batch and for a rank that the graph does not take."""
    info = primary(signature)
    shape = inputs[info.name].shape
    if len(shape) != len(info.shape):
        raise BundleError(_mismatch(info, shape))
    if shape and not shape[0]:
        raise BundleError(f"input {info.name!r} is an empty batch")
    return int(shape[0]) if shape else 1


def timesteps(signature: Signature, value: Array, batch: int) -> tuple[Array, list[float]]:
    """(the timestep input with its batch dimension, if the graph's has one; t of each sample).

    `value` is 0-d, [1] or [B], or [B, …] where the graph takes one per token: the highest then decides.
    """
    info = next(one for one in signature.inputs if one.name == signature.timestep)
    if value.size == 1:
        per_sample = np.broadcast_to(value.reshape(()), (batch,))
        return np.broadcast_to(value.reshape(()), (batch, *info.shape[1:])), [float(t) for t in per_sample]
    if value.shape[0] != batch or value.shape[1:] != tuple(info.shape[1:]):
        raise BundleError(_mismatch(info, value.shape))
    return value, [float(t) for t in value.reshape(batch, -1).max(axis=1)]


def run_batched(
    signature: Signature,
    inputs: Mapping[str, Array],
    bins: Sequence[int],
    run: Run,
    *,
    one_timestep: Collection[int] = (),
) -> Array:
    """Result [B, …] of run(bin, inputs) over chunks of G samples of one bin; a short chunk repeats its last sample.

    bins: of each sample; the timestep input is as timesteps() returned it. one_timestep: bins that want samples of one
    timestep in a chunk even if their graph takes G.
    Raises BundleError for shapes that fit neither the graph nor a batch of it.
    """
    batch, group = len(bins), primary(signature).shape[0] if primary(signature).shape else 1
    batched = {signature.timestep}
    for info in signature.inputs:
        if info.name != signature.timestep and _is_batched(info, inputs[info.name].shape, batch, group):
            batched.add(info.name)
    kinds = _kinds(signature, inputs[signature.timestep], bins, group, one_timestep)
    if batch == group and len(set(kinds)) == 1:
        return run(bins[0], {info.name: _fit(info, inputs[info.name]) for info in signature.inputs})
    parts: list[tuple[list[int], Array]] = []
    for kind in dict.fromkeys(kinds):
        samples = [number for number, one in enumerate(kinds) if one == kind]
        for start in range(0, len(samples), group):
            rows = samples[start : start + group]
            padded = rows + rows[-1:] * (group - len(rows))
            chunk = {
                info.name: _fit(info, inputs[info.name][padded] if info.name in batched else inputs[info.name])
                for info in signature.inputs
            }
            part = run(kind[0], chunk)
            if part.shape[:1] != (group,):
                raise BundleError(f"the output {part.shape} has no batch dimension", hint=f"call with {group} samples")
            parts.append((rows, part[: len(rows)]))
    result = np.empty((batch, *parts[0][1].shape[1:]), parts[0][1].dtype)
    for rows, part in parts:
        result[rows] = part
    return result


def _kinds(
    signature: Signature, t: Array, bins: Sequence[int], group: int, one_timestep: Collection[int]
) -> list[tuple[int, Hashable]]:
    """Samples of one kind may share a run: same bin, and same t where one t has to do for all G."""
    info = next(one for one in signature.inputs if one.name == signature.timestep)
    if info.shape[:1] == (group,):
        every = zip(bins, t, strict=True)
        return [(chosen, one.tobytes() if chosen in one_timestep else 0) for chosen, one in every]
    return [(chosen, float(one)) for chosen, one in zip(bins, t.reshape(-1), strict=True)]


def _is_batched(info: TensorInfo, shape: tuple[int, ...], batch: int, group: int) -> bool:
    rest_fits = shape[1:] == tuple(info.shape[1:])
    if len(shape) == len(info.shape) > 0 and rest_fits and shape[0] == batch and info.shape[0] == group:
        return True
    if shape == tuple(info.shape):
        return False
    raise BundleError(_mismatch(info, shape))


def _fit(info: TensorInfo, value: Array) -> Array:
    # Only the timestep can differ here: [G] where the graph takes a scalar or [1].
    if value.shape == tuple(info.shape):
        return np.ascontiguousarray(value)
    return np.ascontiguousarray(value.reshape(-1)[:1].reshape(info.shape))


def _mismatch(info: TensorInfo, shape: Sequence[int]) -> str:
    return f"input {info.name!r} is {list(shape)}, the graphs take {list(info.shape)} (or a batch of these)"
