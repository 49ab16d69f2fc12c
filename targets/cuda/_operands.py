"""What a kernel takes beside the value it computes on: rows of a sample, vectors of channels, tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from vdq_export.graph import Graph, Value, is_constant


def is_rows(value: Value, shape: Sequence[int]) -> bool:
    """Whether `value` broadcast to `shape` [..., C] is one row [C] for each sample, a sample being leading axes."""
    own = [1] * (len(shape) - len(value.shape)) + [int(n) for n in value.shape]
    if len(own) != len(shape) or own[-1] != shape[-1]:
        return False
    samples = next((i for i, (a, b) in enumerate(zip(own[:-1], shape[:-1], strict=True)) if a != b), len(own) - 1)
    return all(n == 1 for n in own[samples:-1])


def is_channels(value: Value, count: int) -> bool:
    """Whether `value` is one constant number a channel."""
    return is_constant(value) and len(value.shape) > 0 and prod(value.shape) == count == value.shape[-1]


def channels(graph: Graph, value: Value) -> Value:
    """The constant as [C]."""
    if len(value.shape) == 1:
        return value
    return graph.constant(graph.fresh(f"{value.name}.channels"), np.asarray(value.values).reshape(-1))
